package ext4

import (
	"encoding/binary"
	"fmt"
)

// Xattr is an extended attribute by its full name, with its value as getxattr(2) gives it.
type Xattr struct {
	Name  string
	Value []byte
}

// The format (fs/ext4/xattr.h): a magic, in a block of its own a header of 32 bytes, then entries up to four zero bytes
//
//	0 u8 length of the name   1 u8 prefix   2 u16 place of the value   4 u32 inode of the value
//	8 u32 length of the value   12 u32 hash   16 name, padded to 4
const (
	xattrMagic     = 0xea020000
	xattrHeader    = 32
	xattrEntry     = 16
	maxXattrValue  = 64 << 10 // XATTR_SIZE_MAX
	maxXattrNames  = 4096
	indexSystem    = 7
	indexEncrypt   = 9
	nameInlineData = "data"
)

var xattrPrefixes = map[byte]string{1: "user.", 2: "system.posix_acl_access", 3: "system.posix_acl_default", 4: "trusted.", 6: "security.", 7: "system.", 8: "system.richacl"}

// Xattrs reads the extended attributes of a file, in the order in which they are stored. What is
// no attribute to others (inline data, encryption) is left out.
func (d *Node) Xattrs() ([]Xattr, error) {
	var out []Xattr
	err := d.eachXattr(func(index byte, name string, value func() ([]byte, error)) error {
		prefix, ok := xattrPrefixes[index]
		if !ok || index == indexSystem && name == nameInlineData {
			return nil
		}
		if len(out) == maxXattrNames {
			return fmt.Errorf("%w: more than %d attributes", ErrCorrupt, maxXattrNames)
		}
		v, err := value()
		if err == nil && (index == 2 || index == 3) {
			v, err = posixACL(v)
		}
		if err != nil {
			return fmt.Errorf("%s%s: %w", prefix, name, err)
		}
		out = append(out, Xattr{prefix + name, v})
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("attributes of inode %d: %w", d.Number, err)
	}
	return out, nil
}

// inlineRest is the part of inline content that is not in the map.
func (d *Node) inlineRest() ([]byte, error) {
	var rest []byte
	found := false
	err := d.inodeXattrs(func(index byte, name string, value func() ([]byte, error)) error {
		if index != indexSystem || name != nameInlineData {
			return nil
		}
		found = true
		var err error
		rest, err = value()
		return err
	})
	if err == nil && !found {
		err = fmt.Errorf("%w: the rest of its inline content is missing", ErrCorrupt)
	}
	if err != nil {
		return nil, fmt.Errorf("inode %d: %w", d.Number, err)
	}
	return rest, nil
}

type xattrVisitor func(index byte, name string, value func() ([]byte, error)) error

func (d *Node) eachXattr(visit xattrVisitor) error {
	if err := d.inodeXattrs(visit); err != nil {
		return err
	}
	if d.xattrBlock == 0 {
		return nil
	}
	b, err := d.readXattrBlock()
	if err != nil {
		return err
	}
	return d.xattrEntries(b[xattrHeader:], b, visit)
}

// inodeXattrs visits those behind the inode's fields.
func (d *Node) inodeXattrs(visit xattrVisitor) error {
	if d.extra == 0 || 128+d.extra+4 > len(d.raw) {
		return nil
	}
	b := d.raw[128+d.extra:]
	if le.Uint32(b) != xattrMagic {
		return nil
	}
	return d.xattrEntries(b[4:], b[4:], visit)
}

// XattrBlock is the block that holds attributes, 0: none. Files share such blocks.
func (d *Node) XattrBlock() uint64 { return d.xattrBlock }

func (d *Node) readXattrBlock() ([]byte, error) {
	b := make([]byte, d.fs.BlockSize)
	if err := d.fs.ReadBlock(d.xattrBlock, b); err != nil {
		return nil, err
	}
	if le.Uint32(b) != xattrMagic || le.Uint32(b[8:]) != 1 {
		return nil, fmt.Errorf("%w: block %d holds no attributes", ErrCorrupt, d.xattrBlock)
	}
	if d.fs.ROCompat&MetadataCsum != 0 {
		const at = 0x10
		var nr [8]byte
		binary.LittleEndian.PutUint64(nr[:], d.xattrBlock)
		sum := crc32c(crc32c(d.fs.seed, nr[:]), b[:at])
		sum = crc32c(crc32c(sum, []byte{0, 0, 0, 0}), b[at+4:])
		if le.Uint32(b[at:]) != sum {
			return nil, fmt.Errorf("%w of the attributes in block %d", ErrChecksum, d.xattrBlock)
		}
	}
	return b, nil
}

// xattrEntries visits entries; places of values count from the start of base.
func (d *Node) xattrEntries(e, base []byte, visit xattrVisitor) error {
	for {
		if len(e) < 4 {
			return fmt.Errorf("%w: attributes without an end", ErrCorrupt)
		}
		if le.Uint32(e) == 0 {
			return nil
		}
		n := int(e[0])
		if len(e) < xattrEntry+n {
			return fmt.Errorf("%w: an attribute's name of %d bytes", ErrCorrupt, n)
		}
		entry, name := e[:xattrEntry], string(e[xattrEntry:xattrEntry+n])
		if err := visit(entry[1], name, func() ([]byte, error) { return d.xattrValue(entry, base) }); err != nil {
			return err
		}
		if e = e[xattrEntry:]; len(e) < (n+3)&^3 {
			return fmt.Errorf("%w: attributes without an end", ErrCorrupt)
		}
		e = e[(n+3)&^3:]
	}
}

func (d *Node) xattrValue(entry, base []byte) ([]byte, error) {
	at, inode, size := int(le.Uint16(entry[2:])), le.Uint32(entry[4:]), le.Uint32(entry[8:])
	if size > maxXattrValue {
		return nil, fmt.Errorf("%w: a value of %d bytes", ErrCorrupt, size)
	}
	if inode != 0 {
		if d.fs.Incompat&EAInode == 0 {
			return nil, fmt.Errorf("%w: a value in inode %d, without ea_inode", ErrCorrupt, inode)
		}
		v, err := d.fs.Node(inode)
		if err != nil {
			return nil, err
		}
		if v.Flags&flagEAInode == 0 || v.Size != uint64(size) {
			return nil, fmt.Errorf("%w: inode %d of %d bytes is not the value of %d", ErrCorrupt, inode, v.Size, size)
		}
		return v.content(maxXattrValue)
	}
	if at+int(size) > len(base) {
		return nil, fmt.Errorf("%w: a value of %d bytes at byte %d of %d", ErrCorrupt, size, at, len(base))
	}
	return append([]byte(nil), base[at:at+int(size)]...), nil
}

// posixACL turns an access control list as ext4 stores it (fs/ext4/acl.h: version 1, identifiers only
// where they say something) into what the attribute's value is elsewhere (version 2, always
// with one; linux/posix_acl_xattr.h).
func posixACL(b []byte) ([]byte, error) {
	const user, group, nobody = 0x02, 0x08, 0xffffffff
	if len(b) < 4 || le.Uint32(b) != 1 {
		return nil, fmt.Errorf("%w: an access control list of an unknown kind", ErrCorrupt)
	}
	out := le.AppendUint32(nil, 2)
	for b = b[4:]; len(b) > 0; {
		if len(b) < 4 {
			return nil, fmt.Errorf("%w: an access control list that ends within an entry", ErrCorrupt)
		}
		tag := le.Uint16(b)
		out = append(out, b[:4]...)
		b = b[4:]
		id := uint32(nobody)
		if tag == user || tag == group {
			if len(b) < 4 {
				return nil, fmt.Errorf("%w: an access control list that ends within an entry", ErrCorrupt)
			}
			id, b = le.Uint32(b), b[4:]
		}
		out = le.AppendUint32(out, id)
	}
	return out, nil
}
