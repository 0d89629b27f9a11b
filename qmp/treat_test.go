package qmp

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

const testSocket = "/run/kagami/vm-vdb.sock"

func treatFake(q *fakeQEMU, broken bool) error {
	t, err := newTreatment(q, "virtio-disk1", testSocket, "e", "unmap", time.Hour)
	if err != nil {
		return err
	}
	return t.run(broken)
}

func TestTreatmentIsSixCommands(t *testing.T) {
	q := stockQEMU(testSocket)
	if err := treatFake(q, false); err != nil {
		t.Fatal(err)
	}
	if err := q.treatedWell(); err != nil {
		t.Fatal(err)
	}
	changes := slices.DeleteFunc(slices.Clone(q.commands), func(c string) bool { return strings.HasPrefix(c, "query-") })
	want := []string{"blockdev-add", "blockdev-reopen", "blockdev-del", "blockdev-add", "blockdev-reopen", "blockdev-del"}
	if !slices.Equal(changes, want) {
		t.Fatalf("commands %v", changes)
	}
	q.commands = nil
	if err := treatFake(q, false); err != nil {
		t.Fatal(err)
	}
	if slices.ContainsFunc(q.commands, func(c string) bool { return !strings.HasPrefix(c, "query-") }) {
		t.Fatalf("treated twice: %v", q.commands)
	}
}

// Wherever a treatment breaks off, with the command done or not, the next one
// brings it to its end; and until then the device is never without a node.
func TestTreatmentBrokenOffAnywhere(t *testing.T) {
	for _, dead := range []bool{false, true} {
		for _, lose := range []bool{false, true} {
			t.Run(fmt.Sprintf("dead=%v,lose=%v", dead, lose), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) { breakOff(t, dead, lose) })
			})
		}
	}
}

func breakOff(t *testing.T, dead, lose bool) {
	for at := 1; ; at++ {
		q := stockQEMU(testSocket)
		q.nodes["libvirt-2-storage"].dead = dead
		q.failAt, q.lose = at, lose
		err := treatFake(q, dead)
		if q.nodes[q.top] == nil || q.lower(q.top) == nil {
			t.Fatalf("broken off at %d, the disk has no node", at)
		}
		if len(q.commands) < at {
			if err != nil {
				t.Fatal(err)
			}
			if at < 8 {
				t.Fatalf("only %d commands", at-1)
			}
			return
		}
		for try := 0; err != nil && try < 2; try++ { // a job may have to be cleared first
			err = treatFake(q, dead)
		}
		if err != nil {
			t.Fatalf("after a break at %d: %v", at, err)
		}
		if err := q.treatedWell(); err != nil {
			t.Fatalf("after a break at %d: %v", at, err)
		}
	}
}

func TestTreatmentRefuses(t *testing.T) {
	q := stockQEMU("/elsewhere.sock")
	if err := treatFake(q, true); !errors.Is(err, ErrNotAttached) {
		t.Errorf("another socket: %v", err)
	}
	q = stockQEMU(testSocket)
	q.nodes["libvirt-2-storage"].dead = true
	if err := treatFake(q, false); err == nil {
		t.Error("a running VM's dead disk was healed: its guest may write meanwhile")
	}
	q = stockQEMU(testSocket)
	q.nodes["throttle0"] = &fakeNode{driver: "throttle", file: "libvirt-2-format"}
	q.top = "throttle0"
	if err := treatFake(q, false); !errors.Is(err, ErrUnsuited) {
		t.Errorf("a filter node: %v", err)
	}
	for _, c := range []struct {
		alias, socket string
		delay         time.Duration
	}{{"virtio-disk9", testSocket, time.Hour}, {"virtio-disk1", "rel.sock", time.Hour}, {"virtio-disk1", "/a/./b", time.Hour},
		{"virtio-disk1", testSocket, 0}, {"virtio-disk1", testSocket, 1 << 62}} {
		if _, err := newTreatment(stockQEMU(testSocket), c.alias, c.socket, "e", "unmap", c.delay); err == nil {
			t.Errorf("%+v was taken", c)
		}
	}
}

func TestIsDevice(t *testing.T) {
	for _, c := range []struct {
		qdev, alias string
		want        bool
	}{
		{"/machine/peripheral/virtio-disk1/virtio-backend", "virtio-disk1", true},
		{"/machine/peripheral/virtio-disk11/virtio-backend", "virtio-disk1", false},
		{"/machine/peripheral/virtio-disk1", "virtio-disk1", true},
		{"scsi0-0-0-0", "scsi0-0-0-0", true}, {"scsi0-0-0-1", "scsi0-0-0-0", false}, {"", "x", false},
	} {
		if got := isDevice(c.qdev, c.alias); got != c.want {
			t.Errorf("%+v: %v", c, got)
		}
	}
}
