package main

import (
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"kagami/tests/guest/workload"
)

const defaultSeed = 1

func writer(g *guest, a args, out func(string)) error {
	what, err := a.word(0)
	if err != nil {
		return err
	}
	switch what {
	case "start":
		return g.startWriter(a)
	case "stop", "wait", "status":
		return g.endWriter(what, out)
	}
	return fmt.Errorf("no %q", what)
}

func options(a args) (workload.Options, error) {
	dir, err := a.word(1)
	seed, err1 := a.num("seed", defaultSeed)
	slots, err2 := a.num("slots", 0)
	every, err3 := a.num("every", 0)
	count, err4 := a.num("count", 0)
	o := workload.Options{Dir: dir, Seed: seed, Slots: int(slots), Every: time.Duration(every) * time.Millisecond, Count: count}
	for _, f := range a.opts["files"] {
		if !strings.ContainsRune("AB", f) {
			return o, fmt.Errorf("no file %q", f)
		}
		o.Files = append(o.Files, workload.File(f))
	}
	return o, errors.Join(err, err1, err2, err3, err4)
}

func (g *guest) startWriter(a args) error {
	o, err := options(a)
	if err != nil {
		return err
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.writer != nil {
		return errors.New("a writer runs already: stop it first")
	}
	g.writer, err = workload.Start(o, g.emit)
	return err
}

// emit prints what was acknowledged; an I/O error also goes to the console, loudly.
func (g *guest) emit(e workload.Event) {
	if _, err := io.WriteString(g.acks, e.Line()); err != nil {
		say("print acknowledgement: %v", err)
	}
	if e.Err != nil {
		say("I/O ERROR in the writer: %s", strings.TrimSpace(e.Line()))
	}
}

func (g *guest) takeWriter() *workload.Writer {
	g.mu.Lock()
	defer g.mu.Unlock()
	w := g.writer
	g.writer = nil
	return w
}

func (g *guest) endWriter(how string, out func(string)) error {
	g.mu.Lock()
	w := g.writer
	if how == "stop" {
		g.writer = nil
	}
	g.mu.Unlock()
	if w == nil {
		return errors.New("no writer runs")
	}
	switch how {
	case "stop":
		w.Stop()
	case "wait":
		w.Wait()
	}
	appended, blocks, err := w.Progress()
	out(fmt.Sprintf("WROTE A %d B %d", appended, blocks))
	return err
}

func check(_ *guest, a args, out func(string)) error {
	dir, err := a.word(0)
	if err != nil {
		return err
	}
	seed, err := a.num("seed", defaultSeed)
	if err != nil {
		return err
	}
	r, err := workload.Check(dir, seed)
	if err != nil {
		return err
	}
	for l := range strings.Lines(r.String()) {
		out(l)
	}
	if !r.OK() {
		return errors.New("the files are damaged")
	}
	return nil
}
