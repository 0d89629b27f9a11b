package main

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"kagami/tests/guest/workload"
)

// guest is the state commands share.
type guest struct {
	acks    io.Writer
	leaving atomic.Bool // on its way down: no command is taken any more

	mu     sync.Mutex
	writer *workload.Writer
}

type command struct {
	usage string
	run   func(g *guest, a args, out func(string)) error
}

// args are the words after the command's name: KEY=VALUE are options.
type args struct {
	words []string
	opts  map[string]string
}

func parseArgs(words []string) args {
	a := args{opts: map[string]string{}}
	for _, w := range words {
		if k, v, ok := strings.Cut(w, "="); ok && k != "" && !strings.Contains(k, "/") {
			a.opts[k] = v
		} else {
			a.words = append(a.words, w)
		}
	}
	return a
}

// word is the i-th word or an error that shows the usage.
func (a args) word(i int) (string, error) {
	if i >= len(a.words) {
		return "", fmt.Errorf("word %d is missing", i+1)
	}
	return a.words[i], nil
}

// num is the number KEY=N, def when it is not given.
func (a args) num(key string, def uint64) (uint64, error) {
	s, ok := a.opts[key]
	if !ok {
		return def, nil
	}
	return strconv.ParseUint(s, 10, 63)
}

func (g *guest) run(words []string, out func(string)) error {
	if len(words) == 0 {
		return errors.New("no command")
	}
	if g.leaving.Load() {
		return errors.New("the guest is on its way down")
	}
	c, ok := commands()[words[0]]
	if !ok {
		return fmt.Errorf("no command %q", words[0])
	}
	if err := c.run(g, parseArgs(words[1:]), out); err != nil {
		return fmt.Errorf("%s (usage: %s %s): %w", strings.Join(words, " "), words[0], c.usage, err)
	}
	return nil
}

func commands() map[string]command {
	return map[string]command{
		"ping":    {"", func(_ *guest, _ args, out func(string)) error { out("pong " + uptime()); return nil }},
		"help":    {"", help},
		"mount":   {"DEV DIR [opts=ext4 options]", mount},
		"umount":  {"DIR", umount},
		"sync":    {"", func(*guest, args, func(string)) error { unix.Sync(); return nil }},
		"cat":     {"FILE", cat},
		"ls":      {"DIR", ls},
		"put":     {"FILE WORD…", put},
		"sum":     {"FILE|DEV [off=BYTES] [len=BYTES]", sumFile},
		"fstrim":  {"DIR", fstrim},
		"mkfs":    {"DEV", func(_ *guest, a args, out func(string)) error { return mkfs(a, out) }},
		"exec":    {"PROGRAM ARG…", func(_ *guest, a args, out func(string)) error { return execute(a.words, out) }},
		"insmod":  {"NAME", insmod},
		"nic":     {"NAME ADDRESS", nic},
		"nbd":     {"connect|reconnect HOST:PORT EXPORT NUMBER [conns=N] [timeout=SECONDS] [dead=SECONDS]", attachNBD},
		"writer":  {"start DIR [seed=N] [slots=N] [every=MS] [count=N] [files=A|B|AB] | stop | status | wait", writer},
		"check":   {"DIR [seed=N]", check},
		"stop":    {"", stop},
		"restart": {"", restart},
		"crash":   {"", crash},
	}
}

func help(_ *guest, _ args, out func(string)) error {
	var lines []string
	for n, c := range commands() {
		lines = append(lines, n+" "+c.usage)
	}
	slices.Sort(lines)
	for _, l := range lines {
		out(l)
	}
	return nil
}

func mount(_ *guest, a args, _ func(string)) error {
	dev, err1 := a.word(0)
	dir, err2 := a.word(1)
	if err := errors.Join(err1, err2); err != nil {
		return err
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	return unix.Mount(dev, dir, "ext4", 0, a.opts["opts"])
}

func umount(_ *guest, a args, _ func(string)) error {
	dir, err := a.word(0)
	if err != nil {
		return err
	}
	return unix.Unmount(dir, 0)
}

func cat(_ *guest, a args, out func(string)) error {
	name, err := a.word(0)
	if err != nil {
		return err
	}
	b, err := os.ReadFile(name)
	for l := range strings.Lines(string(b)) {
		out(l)
	}
	return err
}

func ls(_ *guest, a args, out func(string)) error {
	dir, err := a.word(0)
	if err != nil {
		return err
	}
	es, err := os.ReadDir(dir)
	for _, e := range es {
		if i, err := e.Info(); err == nil {
			out(fmt.Sprintf("%s %d %s", i.Mode(), i.Size(), i.Name()))
		}
	}
	return err
}

// put writes its words into a new file and fsyncs file and folder.
func put(_ *guest, a args, _ func(string)) error {
	name, err := a.word(0)
	if err != nil {
		return err
	}
	f, err := os.Create(name)
	if err != nil {
		return err
	}
	_, err = f.WriteString(strings.Join(a.words[1:], " ") + "\n")
	err = errors.Join(err, f.Sync(), f.Close())
	d, err2 := os.Open(filepath.Dir(name))
	if err2 != nil {
		return errors.Join(err, err2)
	}
	return errors.Join(err, d.Sync(), d.Close())
}

func sumFile(_ *guest, a args, out func(string)) error {
	name, err1 := a.word(0)
	off, err2 := a.num("off", 0)
	n, err3 := a.num("len", 1<<62)
	if err := errors.Join(err1, err2, err3); err != nil {
		return err
	}
	f, err := os.Open(name)
	if err != nil {
		return err
	}
	defer f.Close()
	h := sha256.New()
	if _, err := io.Copy(h, io.NewSectionReader(f, int64(off), int64(n))); err != nil {
		return err
	}
	out(fmt.Sprintf("%x", h.Sum(nil)))
	return nil
}

func mkfs(a args, out func(string)) error {
	dev, err := a.word(0)
	if err != nil {
		return err
	}
	return execute([]string{"/sbin/mke2fs", "-q", "-F", "-t", "ext4", dev}, out)
}

func execute(words []string, out func(string)) error {
	if len(words) == 0 {
		return errors.New("no program")
	}
	b, err := exec.Command(words[0], words[1:]...).CombinedOutput()
	for l := range strings.Lines(string(b)) {
		out(l)
	}
	return err
}

func insmod(_ *guest, a args, _ func(string)) error {
	name, err := a.word(0)
	if err != nil {
		return err
	}
	return loadModule(filepath.Join("/lib/mod", filepath.Base(name)+".ko"))
}
