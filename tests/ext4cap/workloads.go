package ext4cap

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Workloads are uses of a file system in which rules about what a FLUSH
// promises have failed, or might.
func Workloads() []Workload {
	var all []Workload
	for _, m := range mixes() {
		for _, o := range []string{"data=ordered", "data=writeback", "data=journal", "nodelalloc", "dioread_nolock,discard"} {
			all = append(all, Workload{Name: m.name + ", " + o, Mkfs: []string{"-b", "4096"}, Mount: o, MiB: 24, Run: m.run})
		}
	}
	for name, mkfs := range Features() {
		all = append(all, Workload{Name: "mixture, " + name, Mkfs: mkfs, MiB: 24, Run: mixture})
	}
	all = append(all, changes()...)
	if mayChangeResources() {
		all = append(all, privileged()...)
	}
	return all
}

// mayChangeResources tells whether this process has CAP_SYS_RESOURCE, without which
// ext4 neither grows while mounted nor journals the data of single files.
func mayChangeResources() bool {
	h, d := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}, [2]unix.CapUserData{}
	return unix.Capget(&h, &d[0]) == nil && d[0].Effective>>unix.CAP_SYS_RESOURCE&1 != 0
}

// privileged are workloads that need CAP_SYS_RESOURCE.
func privileged() []Workload {
	return []Workload{
		{Name: "files change to data=journal and back", MiB: 16, Run: func(e *Env) error {
			old := e.Bytes(1 << 15)
			if err := e.write("f", old); err != nil {
				return err
			}
			for range 4 {
				if err := errors.Join(command("chattr", "+j", e.Path("f")), e.write("f", e.Bytes(1<<15)), e.write("f", old),
					command("chattr", "-j", e.Path("f")), e.write("f", e.Bytes(1<<15)), e.write("f", old), e.write("f", e.Bytes(1<<15)), e.write("f", old)); err != nil {
					return err
				}
			}
			return nil
		}},
		{Name: "resize while mounted", Mkfs: []string{"-b", "1024", "-g", "1024"}, MiB: 24, Run: func(e *Env) error {
			if err := errors.Join(e.Unmount(), command("e2fsck", "-fp", e.Disk.Dev), command("resize2fs", e.Disk.Dev, "8M"), e.Mount("")); err != nil {
				return err
			}
			for _, size := range []string{"9M", "16M", "24M"} {
				if err := errors.Join(e.Append("a", 4096, 5), command("resize2fs", e.Disk.Dev, size), e.Create("c"+size, 5000, 5), e.Append("b", 300, 5)); err != nil {
					return err
				}
			}
			return nil
		}},
	}
}

// Features are arguments of mke2fs for file systems of many kinds.
func Features() map[string][]string {
	return map[string][]string{
		"1k blocks": {"-b", "1024"}, "2k blocks": {"-b", "2048"},
		"no checksums":  {"-O", "^metadata_csum,uninit_bg"},
		"no 64bit":      {"-O", "^64bit"},
		"no flex_bg":    {"-O", "^flex_bg,^resize_inode", "-b", "1024", "-g", "2048"},
		"meta_bg":       {"-O", "meta_bg,^resize_inode", "-b", "1024", "-g", "1024"},
		"sparse_super2": {"-O", "sparse_super2", "-b", "1024"},
		"bigalloc":      {"-O", "bigalloc", "-C", "16384"},
		"inline_data":   {"-O", "inline_data", "-I", "256"},
		"no extents":    {"-O", "^extent,^64bit"},
		"small inodes":  {"-I", "128"},
		"fast_commit":   {"-O", "fast_commit"},
		"csum_seed":     {"-O", "metadata_csum_seed"},
		"orphan_file":   {"-O", "orphan_file"},
		"small journal": {"-J", "size=4", "-b", "4096"},
		"tiny journal":  {"-J", "size=1", "-b", "1024"},
		"ea_inode":      {"-O", "ea_inode,large_dir"},
		"no dir_index":  {"-O", "^dir_index"},
		"mmp":           {"-O", "mmp"},
	}
}

// Kinds are workloads in file systems of further kinds, for the replay of journals alone:
// to the follower they are like others.
func Kinds() []Workload {
	const noSums, ext3 = "^metadata_csum,^64bit", "^metadata_csum,^64bit,^extent,^flex_bg,^huge_file,^extra_isize,^dir_nlink"
	all := []Workload{
		{Name: "uninit_bg", Mkfs: []string{"-b", "1024", "-O", "^metadata_csum,uninit_bg"}},
		{Name: "ext3", Mkfs: []string{"-b", "1024", "-I", "128", "-O", ext3}},
		{Name: "ext3, data=journal, small journal", Mkfs: []string{"-b", "1024", "-J", "size=1", "-O", ext3}, Mount: "data=journal"},
		{Name: "checksums v1, 32 bit", Mkfs: []string{"-b", "1024", "-O", noSums}, Mount: "journal_checksum"},
		{Name: "checksums v1, data=journal", Mkfs: []string{"-b", "4096", "-O", "^metadata_csum,64bit"}, Mount: "data=journal,journal_checksum"},
		{Name: "data=journal, 1k, small journal", Mkfs: []string{"-b", "1024", "-J", "size=1"}, Mount: "data=journal"},
		{Name: "async_commit, small journal", Mkfs: []string{"-b", "1024", "-J", "size=1"}, Mount: "journal_async_commit,data=writeback"},
		{Name: "encrypt, verity, stable_inodes", Mkfs: []string{"-b", "4096", "-O", "encrypt,verity,stable_inodes"}},
		{Name: "large_dir", Mkfs: []string{"-b", "1024", "-O", "large_dir"}},
		{Name: "inodes of 1024 bytes", Mkfs: []string{"-b", "4096", "-I", "1024"}},
		{Name: "bigalloc, 1k, data=journal", Mkfs: []string{"-b", "1024", "-O", "bigalloc", "-C", "8192"}, Mount: "data=journal"},
		{Name: "meta_bg, csum_seed", Mkfs: []string{"-b", "1024", "-g", "1024", "-O", "meta_bg,^resize_inode,metadata_csum_seed"}},
		{Name: "orphan_file, inline_data, no flex_bg", Mkfs: []string{"-b", "2048", "-I", "256", "-O", "orphan_file,inline_data,^flex_bg"}},
	}
	for i := range all {
		all[i].Name, all[i].MiB, all[i].Run = "kind "+all[i].Name, 24, mixture
	}
	return all
}

type mix struct {
	name string
	run  func(*Env) error
}

func mixes() []mix {
	return []mix{
		{"appends", func(e *Env) error {
			return errors.Join(e.Append("a", 4096, 12), e.Append("b", 200, 12), e.Append("c", 9000, 8))
		}},
		{"overwrites", func(e *Env) error {
			return errors.Join(e.Prepare("o", 1<<18), e.Overwrite("o", 64, 12, true), e.Overwrite("o", 64, 12, false), e.partial("o", 20))
		}},
		{"reuse", reuse},
		{"allocation", allocation},
		{"threads", threads},
	}
}

// partial overwrites some bytes in the middle of pages, and appends a few.
func (e *Env) partial(name string, count int) error {
	f, err := os.OpenFile(e.Path(name), os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	for range count {
		st, err := f.Stat()
		if err != nil {
			return err
		}
		// At the file's end, across it, and before it, in its last block.
		at := max(0, st.Size()-int64(e.Rand.IntN(300)))
		if _, err := f.WriteAt(e.Bytes(1+e.Rand.IntN(400)), at); err != nil {
			return err
		}
		if e.Rand.IntN(2) == 0 {
			err = f.Sync()
		} else {
			err = unix.Fdatasync(int(f.Fd()))
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// reuse deletes and truncates, so that blocks of data, directories and extent
// trees become others' data at once.
func reuse(e *Env) error {
	for i := range 6 {
		name := fmt.Sprintf("r%d", i%3)
		if err := errors.Join(e.Append(name, 3000+i*1000, 3), os.Truncate(e.Path(name), int64(e.Rand.IntN(5000)))); err != nil {
			return err
		}
		if err := e.Create(fmt.Sprintf("n%d-", i), 6000, 2); err != nil {
			return err
		}
		if err := errors.Join(os.MkdirAll(e.Path(fmt.Sprintf("d%d/e/f", i)), 0o755), e.SyncFS()); err != nil {
			return err
		}
		if err := errors.Join(os.Remove(e.Path(name)), os.RemoveAll(e.Path(fmt.Sprintf("d%d", i))), e.Append("after", 5000, 2)); err != nil {
			return err
		}
		if err := e.replace("config", 2000+i*100); err != nil {
			return err
		}
	}
	return nil
}

// replace is what editors do: write a new file, fsync, rename, fsync the folder.
func (e *Env) replace(name string, n int) error {
	if err := e.Create(name+".new", n, 1); err != nil {
		return err
	}
	dir, err := os.Open(e.Dir)
	if err != nil {
		return err
	}
	defer dir.Close()
	return errors.Join(os.Rename(e.Path(name+".new0"), e.Path(name)), dir.Sync())
}

// SyncFS is syncfs of the file system.
func (e *Env) SyncFS() error {
	dir, err := os.Open(e.Dir)
	if err != nil {
		return err
	}
	defer dir.Close()
	if _, _, no := unix.Syscall(unix.SYS_SYNCFS, dir.Fd(), 0, 0); no != 0 {
		return no
	}
	return nil
}

// allocation writes to preallocated, unwritten and delayed-allocated blocks,
// with O_DIRECT and O_DSYNC too.
func allocation(e *Env) error {
	f, err := os.Create(e.Path("pre"))
	if err != nil {
		return err
	}
	defer f.Close()
	err = unix.Fallocate(int(f.Fd()), 0, 0, 1<<18)
	if errors.Is(err, unix.EOPNOTSUPP) { // no extents: no preallocation
		_, err = f.Write(e.Bytes(1 << 18))
	}
	if err := errors.Join(err, f.Sync()); err != nil {
		return err
	}
	for range 8 {
		if _, err := f.WriteAt(e.Bytes(4096), int64(e.Rand.IntN(64))*4096); err != nil {
			return err
		}
		if err := unix.Fdatasync(int(f.Fd())); err != nil {
			return err
		}
	}
	if err := unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, 8192, 1<<15); err != nil && !errors.Is(err, unix.EOPNOTSUPP) {
		return err
	}
	for _, flags := range []int{os.O_SYNC, unix.O_DSYNC, unix.O_DIRECT, unix.O_DIRECT | unix.O_DSYNC} {
		if err := e.open("pre", flags, 6); err != nil {
			return err
		}
	}
	return e.open("new", unix.O_DIRECT, 6)
}

// open writes pages through a file opened with flags.
func (e *Env) open(name string, flags, count int) error {
	f, err := os.OpenFile(e.Path(name), os.O_CREATE|os.O_RDWR|flags, 0o600)
	if err != nil {
		return err
	}
	defer f.Close()
	page := aligned(4096)
	for i := range count {
		copy(page, e.Bytes(4096))
		if _, err := f.WriteAt(page, int64(e.Rand.IntN(20)+i)*4096); err != nil {
			return err
		}
		if i%3 == 2 {
			if err := unix.Fdatasync(int(f.Fd())); err != nil {
				return err
			}
		}
	}
	return nil
}

// aligned is memory that O_DIRECT takes.
func aligned(n int) []byte {
	b := make([]byte, n+4096)
	off := 4096 - int(uintptr(unsafe.Pointer(&b[0]))%4096)
	return b[off : off+n]
}

// threads let FLUSHes merge: several files are written and synced at a time.
func threads(e *Env) error {
	var wg sync.WaitGroup
	errs := make([]error, 4)
	for i := range errs {
		sub := &Env{Disk: e.Disk, Dir: e.Dir, Rand: fork(e.Rand)}
		wg.Go(func() {
			name := fmt.Sprintf("t%d", i)
			errs[i] = errors.Join(sub.Append(name, 700, 6), sub.Create(name+"-", 3000, 3), sub.Prepare(name+"o", 1<<16), sub.Overwrite(name+"o", 16, 5, i%2 == 0))
		})
	}
	wg.Wait()
	return errors.Join(errs...)
}

// mixture is a little of everything.
func mixture(e *Env) error {
	return errors.Join(e.Append("a", 4096, 5), e.Append("b", 200, 6), e.Prepare("o", 1<<16), e.Overwrite("o", 16, 5, true),
		e.Overwrite("o", 16, 5, false), e.partial("b", 6), reuse(e), allocation(e), e.links())
}

// links makes links, names, attributes.
func (e *Env) links() error {
	long := filepath.Join("/", string(make([]byte, 0, 100)), "somewhere/far/away/that/does/not/fit/into/an/inode/of/an/ext4/file/system")
	return errors.Join(os.Symlink("short", e.Path("l1")), os.Symlink(long, e.Path("l2")), os.Link(e.Path("a"), e.Path("l3")), e.SyncFS(),
		unix.Setxattr(e.Path("a"), "user.test", e.Bytes(100), 0), unix.Setxattr(e.Path("b"), "user.test", e.Bytes(700), 0), e.SyncFS(),
		os.Chmod(e.Path("a"), 0o640), os.Chown(e.Path("b"), 7, 8), e.SyncFS(), os.Remove(e.Path("l1")), e.SyncFS())
}

// changes are file systems that become others while they are followed.
func changes() []Workload {
	again := func(e *Env, opts string) error { return errors.Join(e.Unmount(), e.Mount(opts)) }
	return []Workload{
		{Name: "unmount and mount", MiB: 16, Run: func(e *Env) error {
			for i := range 5 {
				if err := errors.Join(e.Create(fmt.Sprintf("m%d-", i), 9000, 3), e.Append("a", 3000, 3), again(e, "")); err != nil {
					return err
				}
				if err := errors.Join(os.Remove(e.Path(fmt.Sprintf("m%d-1", i))), e.Append("b", 8192, 4)); err != nil {
					return err
				}
			}
			return nil
		}},
		{Name: "data=journal, then ordered", Mount: "data=journal", MiB: 16, Run: func(e *Env) error {
			old := e.Bytes(1 << 16)
			if err := e.write("f", old); err != nil {
				return err
			}
			for range 3 { // ordered writes of new and, again, of the journaled content
				if err := errors.Join(again(e, "data=ordered"), e.write("f", e.Bytes(1<<16)), e.write("f", old), e.write("g", e.Bytes(3000)),
					e.write("f", e.Bytes(1<<16)), e.write("f", old), again(e, "data=journal"), e.write("f", e.Bytes(1<<16)), e.write("f", old)); err != nil {
					return err
				}
			}
			return nil
		}},
		{Name: "files made by debugfs while unmounted", Mkfs: []string{"-b", "4096"}, MiB: 24, Run: func(e *Env) error {
			from := filepath.Join(filepath.Dir(e.Dir), "from")
			if err := errors.Join(e.Create("c", 20000, 5), e.Append("a", 4096, 5), os.WriteFile(from, e.Bytes(1<<16), 0o600)); err != nil {
				return err
			}
			for i := range 3 {
				name := fmt.Sprintf("d%d", i)
				if err := errors.Join(e.Unmount(), command("debugfs", "-w", "-R", "write "+from+" "+name, e.Disk.Dev), e.Mount(""),
					e.Overwrite(name, 16, 1, false), e.Overwrite(name, 16, 10, true), e.Append("a", 4096, 3)); err != nil {
					return err
				}
			}
			return nil
		}},
		{Name: "raw writes while unmounted", MiB: 16, Run: func(e *Env) error {
			for range 3 {
				if err := errors.Join(e.Append("a", 4096, 4), e.Unmount(), e.raw(14<<20, 40), e.Mount(""), e.Append("a", 4096, 4)); err != nil {
					return err
				}
			}
			return nil
		}},
		{Name: "journal removed and made again", MiB: 16, Run: func(e *Env) error {
			for range 2 {
				if err := errors.Join(e.Append("a", 4096, 4), e.Unmount(), command("tune2fs", "-O", "^has_journal", e.Disk.Dev), e.Mount(""),
					e.Append("b", 4096, 6), e.Create("c", 5000, 4), e.Unmount(), command("tune2fs", "-j", e.Disk.Dev), e.Mount(""), e.Append("a", 200, 6)); err != nil {
					return err
				}
			}
			return nil
		}},
		{Name: "mkfs again", MiB: 16, Run: func(e *Env) error {
			for _, args := range [][]string{{}, {"-b", "1024"}, {"-O", "^has_journal"}, {}} {
				if err := errors.Join(e.Append("a", 4096, 4), e.Create("c", 5000, 4), e.Unmount(),
					command("mke2fs", append(append([]string{"-q", "-F", "-t", "ext4"}, args...), e.Disk.Dev)...), e.Mount("")); err != nil {
					return err
				}
			}
			return e.Append("z", 4096, 4)
		}},
		{Name: "resize", Mkfs: []string{"-b", "1024", "-g", "1024"}, MiB: 24, Run: func(e *Env) error {
			for _, size := range []string{"12M", "13M", "20M", "24M"} {
				if err := errors.Join(e.Append("a", 4096, 5), e.Unmount(), command("e2fsck", "-fp", e.Disk.Dev), command("resize2fs", e.Disk.Dev, size), e.Mount(""),
					e.Create("c"+size, 5000, 5), e.Append("b", 300, 5)); err != nil {
					return err
				}
			}
			return nil
		}},
		{Name: "async_commit", Mount: "journal_async_commit,data=writeback", MiB: 16, Run: mixture},
		{Name: "async_commit, checksums v1", Mount: "journal_async_commit,data=writeback,journal_checksum", Mkfs: []string{"-O", "^metadata_csum"}, MiB: 16, Run: mixture},
		{Name: "fast_commit", Mkfs: []string{"-O", "fast_commit"}, MiB: 16, Run: func(e *Env) error {
			return errors.Join(e.Append("a", 4096, 10), e.Create("c", 3000, 10), e.Append("b", 200, 10))
		}},
		{Name: "checkpoints", Mkfs: []string{"-J", "size=4", "-b", "4096"}, MiB: 24, Run: func(e *Env) error {
			for i := range 12 {
				if err := errors.Join(e.Create(fmt.Sprintf("k%d-", i), 2000, 12), e.SyncFS(), os.Remove(e.Path(fmt.Sprintf("k%d-3", i))), e.Append("a", 4096, 6)); err != nil {
					return err
				}
			}
			unix.Sync()
			return e.Append("a", 200, 6)
		}},
		{Name: "wrap", Mkfs: []string{"-J", "size=1", "-b", "1024"}, MiB: 16, Run: func(e *Env) error {
			for i := range 30 {
				if err := errors.Join(e.Create(fmt.Sprintf("w%d-", i), 1000, 8), e.Append("a", 500, 4)); err != nil {
					return err
				}
			}
			return nil
		}},
		{Name: "remounts", MiB: 16, Run: func(e *Env) error {
			for _, o := range []string{"ro", "rw", "rw,commit=1", "rw,noquota", "rw,errors=continue"} {
				if err := errors.Join(unix.Mount("", e.Dir, "", unix.MS_REMOUNT|readOnly(o == "ro"), dropRO(o)), skipRO(o, func() error {
					return errors.Join(e.Append("a", 4096, 3), e.Create("c"+o, 900, 3))
				})); err != nil {
					return err
				}
			}
			return nil
		}},
	}
}

func readOnly(ro bool) uintptr {
	if ro {
		return unix.MS_RDONLY
	}
	return 0
}

func dropRO(o string) string {
	if o == "ro" || o == "rw" {
		return ""
	}
	return o[3:]
}

func skipRO(o string, f func() error) error {
	if o == "ro" {
		return nil
	}
	return f()
}

// write replaces a file's content in place and fsyncs.
func (e *Env) write(name string, p []byte) error {
	f, err := os.OpenFile(e.Path(name), os.O_CREATE|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	_, err = f.WriteAt(p, 0)
	return errors.Join(err, f.Sync(), f.Close())
}

// raw writes to the device, from off on, each write followed by fsync. What is
// promised by that is noted for the judge.
func (e *Env) raw(off int64, count int) error {
	f, err := os.OpenFile(e.Disk.Dev, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	for i := range count {
		at := off + int64(i)*4096
		e.Disk.Note(fmt.Sprintf("raw %d %d", at, 4096))
		if _, err := f.WriteAt(e.Bytes(4096), at); err != nil {
			return err
		}
		if err := f.Sync(); err != nil {
			return err
		}
	}
	e.Disk.Note("raw end") // what is written from now on is the file system's again
	return nil
}
