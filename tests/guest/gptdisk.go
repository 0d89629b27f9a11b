package guest

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
)

// Layout of the disks BuildGPTDisk makes, in sectors of 512 bytes. GRUB's core
// lies in a BIOS boot partition of its own; the rest, but for the second copy of
// the partition table, is the root partition, number 2.
const (
	sector    = 512
	coreStart = 2048
	coreSize  = 2048
	rootStart = coreStart + coreSize
	gptTail   = 2048
)

// RootOffset is where the root file system of a disk made by BuildGPTDisk begins, in bytes.
const RootOffset = rootStart * sector

const minGPTDisk = 128 << 20

const grubDir = "/usr/lib/grub/i386-pc"

// GPTOptions of a self-booting disk.
type GPTOptions struct {
	Size int64  // bytes, a multiple of 1 MiB, at least 128 MiB; 256 MiB when 0
	Root string // the root partition's name in the guest; /dev/vda2 when empty
}

// BuildGPTDisk makes a disk that boots by itself on a BIOS: GPT, GRUB, an ext4 root
// with its own kernel, whose init is tests/guest/init. It needs no privileges, no
// loop device. Programs: grub-mkimage and /usr/lib/grub/i386-pc, sfdisk, mke2fs.
func BuildGPTDisk(path string, o GPTOptions) error {
	if o.Size == 0 {
		o.Size = 256 << 20
	}
	if o.Root == "" {
		o.Root = "/dev/vda2"
	}
	if o.Size < minGPTDisk || o.Size%(1<<20) != 0 {
		return fmt.Errorf("disk of %d bytes: want a multiple of 1 MiB, at least 128 MiB", o.Size)
	}
	work, err := os.MkdirTemp(filepath.Dir(path), ".gpt-*")
	if err != nil {
		return err
	}
	defer os.RemoveAll(work)
	if err := buildGPT(path, work, o); err != nil {
		return errors.Join(fmt.Errorf("make boot disk %s: %w", path, err), os.Remove(path))
	}
	return nil
}

func buildGPT(path, work string, o GPTOptions) error {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := f.Truncate(o.Size); err != nil {
		return err
	}
	table := fmt.Sprintf("label: gpt\nstart=%d,size=%d,type=21686148-6449-6E6F-744E-656564454649\nstart=%d,size=%d,type=L\n",
		coreStart, coreSize, rootStart, o.Size/sector-rootStart-gptTail)
	if err := run(table, "sfdisk", "-q", "--no-reread", "--no-tell-kernel", path); err != nil {
		return err
	}
	if err := makeRoot(path, work, o); err != nil {
		return err
	}
	return installGRUB(f, work, o)
}

// makeRoot fills the root partition with a file system.
func makeRoot(path, work string, o GPTOptions) error {
	es, err := diskTree()
	if err != nil {
		return err
	}
	root := filepath.Join(work, "root")
	if err := unpack(root, es); err != nil {
		return err
	}
	kib := (o.Size/sector - rootStart - gptTail) / 2
	return run("", "mke2fs", "-q", "-F", "-t", "ext4", "-d", root, "-E", "offset="+strconv.Itoa(RootOffset), path,
		strconv.FormatInt(kib, 10)+"k")
}

// diskTree is the root file system: kernel, the initramfs that finds the disk,
// init and programs.
func diskTree() ([]entry, error) {
	version, err := Version()
	if err != nil {
		return nil, err
	}
	kernel, err := os.ReadFile("/boot/vmlinuz-" + version)
	if err != nil {
		return nil, err
	}
	init, err := buildInit()
	if err != nil {
		return nil, err
	}
	ms, err := moduleTree(version, bootModules, nil)
	if err != nil {
		return nil, err
	}
	initrd, err := gzipCPIO(append(ms, entry{"init", modeExec, init}))
	if err != nil {
		return nil, err
	}
	ps, err := programTree()
	es := []entry{
		{"boot/vmlinuz", modeFile, kernel},
		{"boot/initrd", modeFile, initrd},
		{"sbin/init", modeExec, init},
		{"etc/kagami-root", modeFile, nil},
	}
	for _, d := range []string{"proc", "sys", "dev", "run", "tmp", "mnt", "data"} {
		es = append(es, entry{d, modeDir, nil})
	}
	return slices.Concat(es, ps), err
}

func unpack(root string, es []entry) error {
	es, err := withParents(slices.Clone(es))
	if err != nil {
		return err
	}
	if err := os.Mkdir(root, 0o755); err != nil {
		return err
	}
	for _, e := range es {
		name := filepath.Join(root, e.name)
		if e.mode == modeDir {
			err = os.Mkdir(name, 0o755)
		} else {
			err = os.WriteFile(name, e.data, os.FileMode(e.mode&0o777))
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// installGRUB makes a core image that needs no configuration file and puts it
// and the boot sector in place.
func installGRUB(f *os.File, work string, o GPTOptions) error {
	cfg := filepath.Join(work, "early.cfg")
	text := strings.Join([]string{
		"serial", "terminal_output serial", "set root=(hd0,gpt2)",
		"linux /boot/vmlinuz " + Cmdline + " kagami.root=" + o.Root,
		"initrd /boot/initrd", "boot", "",
	}, "\n")
	if err := os.WriteFile(cfg, []byte(text), 0o600); err != nil {
		return err
	}
	img := filepath.Join(work, "core.img")
	if err := run("", "grub-mkimage", "-d", grubDir, "-O", "i386-pc", "-o", img, "-p", "(hd0,gpt2)/boot/grub", "-c", cfg,
		"biosdisk", "part_gpt", "ext2", "linux", "normal", "serial", "terminal", "boot"); err != nil {
		return err
	}
	core, err := os.ReadFile(img)
	if err != nil {
		return err
	}
	boot, err := os.ReadFile(filepath.Join(grubDir, "boot.img"))
	if err != nil {
		return err
	}
	return placeGRUB(f, boot, core)
}

// placeGRUB writes boot sector and core. Fields, from GRUB's boot.S and diskboot.S: boot
// sector 0x5c u64 first sector of the core, 0x66 two bytes that become NOPs so
// that the drive the BIOS booted from is used; core 0x1f4 u64 its second sector.
func placeGRUB(f *os.File, boot, core []byte) error {
	if len(boot) != sector || len(core) < sector || len(core) > coreSize*sector {
		return fmt.Errorf("GRUB images of %d and %d bytes do not fit", len(boot), len(core))
	}
	mbr := make([]byte, sector)
	if _, err := f.ReadAt(mbr, 0); err != nil {
		return err
	}
	copy(mbr[:440], boot)
	binary.LittleEndian.PutUint64(mbr[0x5c:], coreStart)
	mbr[0x66], mbr[0x67] = 0x90, 0x90
	binary.LittleEndian.PutUint64(core[0x1f4:], coreStart+1)
	_, err1 := f.WriteAt(mbr, 0)
	_, err2 := f.WriteAt(core, coreStart*sector)
	return errors.Join(err1, err2)
}

// run runs a program of /usr/sbin, /sbin or the PATH.
func run(stdin, name string, args ...string) error {
	for _, d := range []string{"/usr/sbin/", "/sbin/"} {
		if _, err := exec.LookPath(name); err != nil {
			if _, err := os.Stat(d + name); err == nil {
				name = d + name
			}
		}
	}
	var errs bytes.Buffer
	c := exec.Command(name, args...)
	c.Stdin, c.Stderr, c.Stdout = strings.NewReader(stdin), &errs, &errs
	if err := c.Run(); err != nil {
		return fmt.Errorf("%s: %w: %s", name, err, strings.TrimSpace(errs.String()))
	}
	return nil
}

// BuildExt4 makes a raw image of size bytes that is one ext4 file system, with
// further options of mke2fs.
func BuildExt4(path string, size int64, options ...string) error {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	if err := errors.Join(f.Truncate(size), f.Close()); err != nil {
		return err
	}
	return run("", "mke2fs", append(append([]string{"-q", "-F", "-t", "ext4"}, options...), path)...)
}
