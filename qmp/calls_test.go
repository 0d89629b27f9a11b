package qmp

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"
	"time"

	gq "github.com/digitalocean/go-qemu/qmp"
)

func TestAwaitGivesUpButFinishWaits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := &gate{}
		c := &calls{gate: g}
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		ended, freed := false, false
		err := awaitErr(ctx, c, "wait", func() error {
			time.Sleep(time.Minute)
			ended = true
			return nil
		})
		if !errors.Is(err, context.DeadlineExceeded) {
			t.Fatal(err)
		}
		c.finish(func() {
			if !ended {
				t.Error("freed while a call used it")
			}
			freed = true
		})
		if err := g.close(10 * time.Second); err == nil {
			t.Error("closed while a call was under way")
		}
		if err := awaitErr(t.Context(), c, "too late", func() error { return nil }); !errors.Is(err, ErrClosed) {
			t.Error(err)
		}
		time.Sleep(2 * time.Minute)
		synctest.Wait()
		if !freed {
			t.Error("never freed")
		}
	})
}

func TestLocks(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var l locks
		unlock, err := l.lock(t.Context(), "a")
		if err != nil {
			t.Fatal(err)
		}
		if other, err := l.lock(t.Context(), "b"); err != nil {
			t.Fatal(err)
		} else {
			other()
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if _, err := l.lock(ctx, "a"); !errors.Is(err, context.DeadlineExceeded) {
			t.Fatal(err)
		}
		unlock()
		if again, err := l.lock(t.Context(), "a"); err != nil {
			t.Fatal(err)
		} else {
			again()
		}
	})
}

func TestEventQueue(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		q := newEventQueue()
		for range maxEvents + 5 {
			q.push(Event{Kind: EventStarted})
		}
		q.push(Event{Kind: EventDisconnected})
		q.push(Event{Kind: EventStarted}) // after the last one
		out := make(chan Event)
		go func() {
			defer close(out)
			q.pump(t.Context(), out)
		}()
		var got []EventKind
		for e := range out {
			got = append(got, e.Kind)
		}
		if len(got) != 7 || got[0] != EventLost || got[6] != EventDisconnected {
			t.Fatalf("read %v", got)
		}
	})
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		q, out := newEventQueue(), make(chan Event)
		done := make(chan struct{})
		go func() {
			defer close(done)
			q.pump(ctx, out)
		}()
		synctest.Wait()
		q.push(Event{Kind: EventPaused})
		if e := <-out; e.Kind != EventPaused {
			t.Fatal(e)
		}
		q.push(Event{Kind: EventPaused}) // nobody reads it
		synctest.Wait()
		cancel()
		<-done
	})
}

func TestMonitorReplies(t *testing.T) {
	reply := ""
	m := &Monitor{command: func(string) (string, error) { return reply, nil }}
	var v struct{ Running bool }
	reply = `{"return":{"running":true},"id":"libvirt-1"}`
	if err := execute(m, "query-status", nil, &v); err != nil || !v.Running {
		t.Fatal(v, err)
	}
	reply = `{"id":"libvirt-2","error":{"class":"DeviceNotFound","desc":"no such node"}}`
	var qe *QMPError
	if err := execute(m, "x", nil, nil); !errors.As(err, &qe) || qe.Class != "DeviceNotFound" {
		t.Fatal(err)
	}
	for _, bad := range []string{"", "[]", `{"id":"x"}`, `{"return":7}`, "{"} {
		reply = bad
		if err := execute(m, "x", nil, &v); err == nil {
			t.Errorf("%q was taken", bad)
		}
	}
	if _, err := m.Events(t.Context()); !errors.Is(err, gq.ErrEventsNotSupported) {
		t.Error(err)
	}
}
