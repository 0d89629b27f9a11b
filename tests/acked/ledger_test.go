package acked

import (
	"errors"
	"os"
	"path/filepath"
	"reflect"
	"testing"
)

func TestLedgerFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "ledger")
	l, err := NewLedger(Config{Seed: 5, MaxOps: 20}, path)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := NewLedger(Config{}, path); err == nil {
		t.Error("a ledger's file was overwritten")
	}
	dir := filepath.Join(t.TempDir(), "w")
	w, err := Start(dir, l)
	if err != nil {
		t.Fatal(err)
	}
	if err := w.Wait(); err != nil {
		t.Fatal(err)
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	got, err := LoadLedger(path)
	if err != nil {
		t.Fatal(err)
	}
	if !reflect.DeepEqual(got.acks, l.acks) || !reflect.DeepEqual(got.issued, l.issued) || !got.LastAck().Equal(l.LastAck()) {
		t.Error("the loaded ledger differs")
	}
	if r := check(t, dir, got); r.Err() != nil || r.Acked != 20*len(AllWriters()) {
		t.Errorf("%v: %v", r, r.Err())
	}
}

// TestFreeze: what returns after the disaster is under way, and ends its writer.
func TestFreeze(t *testing.T) {
	l, err := NewLedger(Config{Seed: 6}, "")
	if err != nil {
		t.Fatal(err)
	}
	dir := filepath.Join(t.TempDir(), "w")
	w, err := Start(dir, l)
	if err != nil {
		t.Fatal(err)
	}
	run(t, l, 20)
	l.Freeze()
	acked := l.Acked()
	if err := w.Wait(); !errors.Is(err, errFrozen) {
		t.Errorf("the writers ended by %v", err)
	}
	if r := check(t, dir, l); r.Err() != nil || r.Acked != acked {
		t.Errorf("%d acknowledged before, then %v: %v", acked, r, r.Err())
	}
}

func TestLedgerTailAndDamage(t *testing.T) {
	path := filepath.Join(t.TempDir(), "ledger")
	head := `{"seed":1,"writers":[{"kind":"files"}]}` + "\n"
	tests := map[string]struct {
		body string
		acks int
		bad  bool
	}{
		"whole":          {"i 0 1\na 0 1 5\ni 0 2\n", 1, false},
		"torn last line": {"i 0 1\na 0 1 5\ni 0 2\na 0 2", 1, false},
		"gap":            {"i 0 2\n", 0, true},
		"ack first":      {"a 0 1 5\n", 0, true},
		"no such writer": {"i 1 1\n", 0, true},
		"noise":          {"hello\n", 0, true},
	}
	for name, tt := range tests {
		if err := os.WriteFile(path, []byte(head+tt.body), 0o600); err != nil {
			t.Fatal(err)
		}
		l, err := LoadLedger(path)
		if (err != nil) != tt.bad || (err == nil && l.Acked() != tt.acks) {
			t.Errorf("%s: %+v, %v", name, l, err)
		}
	}
}

func TestConfigIsChecked(t *testing.T) {
	bad := []Config{
		{Writers: []Writer{{}}}, {Writers: []Writer{{Kind: Append}}}, {Writers: []Writer{{Kind: "sing", Sync: Fsync}}},
		{Writers: []Writer{{Kind: Append, Sync: Fsync, Shared: true}}}, {Writers: []Writer{{Kind: Files, Sync: Fsync}}},
		{Blocks: -1}, {MaxOps: -1}, {MaxOps: 1 << 30},
	}
	for _, c := range bad {
		if _, err := NewLedger(c, ""); err == nil {
			t.Errorf("%+v was accepted", c)
		}
	}
}
