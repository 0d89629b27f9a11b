package jbd2

// uuidSize follows a tag without FlagSameUUID, in bytes.
const uuidSize = 16

// Tags appends the tags of a descriptor block to dst. The list ends at the
// tag with FlagLast or where no further tag fits, as in the kernel; no block
// is refused. ok tells whether the block's own checksum is right (true where
// it has none).
func (f Format) Tags(dst []Tag, block []byte) (tags []Tag, ok bool) {
	size, end := f.TagSize(), len(block)
	if f.Features.SumV2or3() {
		end -= tailSize
	}
	for p := HeaderSize; p+size <= end; {
		t := f.decodeTag(block[p:])
		dst = append(dst, t)
		p += size
		if t.Flags&FlagSameUUID == 0 {
			p += uuidSize
		}
		if t.Flags&FlagLast != 0 {
			break
		}
	}
	return dst, f.tailOK(block)
}
