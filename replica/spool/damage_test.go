package spool

import (
	"errors"
	"io"
	"strings"
	"testing"

	"kagami/ext4j/epoch"
	"kagami/tests/fault"
)

// place of each record in a spool of four segments, three records each.
type spot struct {
	file string
	off  int64
	size int64
}

func damagedSpool(t *testing.T, seed int64) (*fault.FS, *Spool, map[epoch.LSN]spot) {
	f := fault.NewFS(seed)
	o := small(f, "/")
	o.MaxBytes *= 2
	sp, _ := open(t, o, 0)
	at := map[epoch.LSN]spot{}
	for lsn := epoch.LSN(1); lsn <= 12; lsn++ {
		r := writeRec(lsn, 1, 5500)
		if lsn%3 == 0 {
			r = closeRec(lsn, 1)
		}
		put(t, sp, r)
		n := int64(epoch.StoredSize(len(r.Payload)))
		at[lsn] = spot{sp.cur.slot.name(), sp.cur.end - n, n}
		commit(t, sp, lsn/3*3)
	}
	return f, sp, at
}

// TestRotInDurableRecord: a reader names the place, and never takes it for the end.
func TestRotInDurableRecord(t *testing.T) {
	for seed := range int64(120) {
		f, sp, at := damagedSpool(t, seed)
		bad := epoch.LSN(1 + seed%12)
		if _, err := f.FlipBit("/"+at[bad].file, at[bad].off, at[bad].size); err != nil {
			t.Fatal(err)
		}
		r := sp.NewReader(1)
		var err error
		for lsn := epoch.LSN(1); err == nil; lsn++ {
			var rec epoch.Record
			if rec, err = r.Next(); err == nil && (rec.LSN != lsn || lsn >= bad) {
				t.Fatalf("seed %d: read %d, damaged is %d", seed, rec.LSN, bad)
			}
		}
		if !errors.Is(err, ErrCorrupt) || !strings.Contains(err.Error(), at[bad].file) || !strings.Contains(err.Error(), "offset") {
			t.Fatalf("seed %d: %v", seed, err)
		}
		if _, again := r.Next(); !errors.Is(again, ErrCorrupt) {
			t.Fatalf("seed %d: second read: %v", seed, again)
		}
	}
}

// TestRotBeforeOpen: the log ends before the damage, and Open says so. Where a later
// segment vouches for the record, it says that it is lost.
func TestRotBeforeOpen(t *testing.T) {
	for seed := range int64(120) {
		f, sp, at := damagedSpool(t, seed)
		bad := epoch.LSN(1 + seed%12)
		if _, err := f.FlipBit("/"+at[bad].file, at[bad].off, at[bad].size); err != nil {
			t.Fatal(err)
		}
		must(t, sp.Close())
		sp, rec := open(t, small(f.Crash(), "/"), 0)
		want := (bad - 1) / 3 * 3
		if rec.Durable.LSN != want || rec.Closed != (want > 0) || rec.Note == "" && bad != 12 {
			t.Fatalf("seed %d: record %d damaged: %+v", seed, bad, rec)
		}
		if bad <= 9 && rec.Lost != 9 { // known when the last segment was begun
			t.Fatalf("seed %d: record %d damaged: %+v", seed, bad, rec)
		}
		r := sp.NewReader(1)
		for lsn := epoch.LSN(1); lsn <= want; lsn++ {
			if rec, err := r.Next(); err != nil || rec.LSN != lsn {
				t.Fatalf("seed %d: %v", seed, err)
			}
		}
		if _, err := r.Next(); err != io.EOF {
			t.Fatalf("seed %d: %v", seed, err)
		}
		put(t, sp, closeRec(want+1, 2)) // and it goes on
		commit(t, sp, want+1)
	}
}

// TestRotInHeader: a segment without its header is missed.
func TestRotInHeader(t *testing.T) {
	for seed := range int64(60) {
		f, sp, at := damagedSpool(t, seed)
		bad := at[epoch.LSN(1+seed%12)].file
		if _, err := f.FlipBit("/"+bad, 0, headerBytes); err != nil {
			t.Fatal(err)
		}
		must(t, sp.Close())
		_, rec := open(t, small(f.Crash(), "/"), 0)
		if rec.Durable.LSN >= 12 || !strings.Contains(rec.Note, bad) {
			t.Fatalf("seed %d: header of %s damaged: %+v", seed, bad, rec)
		}
	}
}

// TestRotAtTail: damage in what no commit covered ends the log and loses nothing durable.
func TestRotAtTail(t *testing.T) {
	for seed := range int64(100) {
		f, sp, _ := damagedSpool(t, seed)
		put(t, sp, writeRec(13, 1, 900), writeRec(14, 1, 900), closeRec(15, 1))
		g := sp.cur
		n := int64(2*epoch.StoredSize(900) + epoch.StoredSize(32))
		if _, err := f.FlipBit("/"+g.slot.name(), g.end-n, n); err != nil {
			t.Fatal(err)
		}
		must(t, sp.Close())
		_, rec := open(t, small(f.Kill(), "/"), 0)
		if rec.Durable.LSN != 12 || rec.Lost != 0 {
			t.Fatalf("seed %d: %+v", seed, rec)
		}
	}
}

// TestRecordOfLaterRelease: a whole record that this release does not know is
// neither damage nor the end of the log: the folder is left as it is.
func TestRecordOfLaterRelease(t *testing.T) {
	f, sp, at := damagedSpool(t, 1)
	if err := sp.Close(); err != nil {
		t.Fatal(err)
	}
	f = f.Crash()
	name := "/" + at[5].file
	b, err := f.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	h, err := decodeHeader(b[:headerBytes])
	if err != nil {
		t.Fatal(err)
	}
	rec := epoch.Record{Type: 77, Lineage: h.Lineage, Session: h.Session, LSN: 5, Payload: make([]byte, at[5].size-epoch.HeaderSize)}
	rec.Seal()
	copy(b[at[5].off:], rec.AppendStored(nil, epoch.CodecRaw, rec.Payload, h.seed()))
	f.WriteFile(name, b)
	o := small(f, "/")
	o.MaxBytes *= 2
	if _, _, err := Open(o, 0); !errors.Is(err, epoch.ErrUnsupported) || errors.Is(err, ErrCorrupt) {
		t.Errorf("opened: %v", err)
	}
	if now, err := f.ReadFile(name); err != nil || string(now) != string(b) {
		t.Errorf("the segment was changed: %v", err)
	}
}
