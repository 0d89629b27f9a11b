package activelog

import (
	"cmp"
	"slices"

	"kagami/ext4j/epoch"
)

// entry is one region of the set.
type entry struct {
	key     key
	pins    int
	durable bool // its addition is durable
	kept    bool // recovered: stays until adopt
	last    epoch.LSN
	written uint64 // the set's clock at the last unpin after a write; 0: never
}

// disk is what is known about the fdatasyncs of one image, in clock values:
// everything written at or before the value is covered.
type disk struct {
	written uint64 // last unpin
	begun   uint64 // by the newest fdatasync that began
	synced  uint64 // by one that returned without error
}

// set is the regions in memory. It is pure: no locks, no I/O.
type set struct {
	max     int
	entries map[key]*entry
	disks   map[uint32]*disk
	clock   uint64
	acked   epoch.LSN
}

func newSet(limit int, kept []key) *set {
	s := &set{max: limit, entries: make(map[key]*entry, limit), disks: map[uint32]*disk{}}
	for _, k := range kept {
		s.entries[k] = &entry{key: k, durable: true, kept: true}
	}
	return s
}

// span is a run of regions of one disk.
type span struct {
	first key
	n     int
}

// pin pins all regions of a span if every one is in the set and durable. It
// allocates nothing.
func (s *set) pin(sp span) bool {
	for i := range sp.n {
		if e := s.entries[sp.first+key(i)]; e == nil || !e.durable {
			return false
		}
	}
	for i := range sp.n {
		s.entries[sp.first+key(i)].pins++
	}
	return true
}

// unpin undoes a pin. written says that the regions were written meanwhile, by
// records up to last. It reports false when a region is not pinned.
func (s *set) unpin(sp span, written bool, last epoch.LSN) bool {
	ok := true
	for i := range sp.n {
		e := s.entries[sp.first+key(i)]
		if e == nil || e.pins == 0 {
			ok = false
			continue
		}
		e.pins--
		if written {
			s.clock++
			e.written, e.last = s.clock, max(e.last, last)
			s.disk(e.key.region().Disk).written = s.clock
		}
	}
	return ok
}

// adopt makes recovered regions like others that records up to last have written.
func (s *set) adopt(last epoch.LSN) {
	for _, e := range s.entries {
		if !e.kept {
			continue
		}
		s.clock++
		e.kept, e.written, e.last = false, s.clock, max(e.last, last)
		s.disk(e.key.region().Disk).written = s.clock
	}
}

func (s *set) disk(slot uint32) *disk {
	d := s.disks[slot]
	if d == nil {
		d = &disk{}
		s.disks[slot] = d
	}
	return d
}

// mayLeave reports that both sites are known to hold the region alike.
func (s *set) mayLeave(e *entry) bool {
	return e.pins == 0 && e.durable && !e.kept && e.last <= s.acked && e.written <= s.disk(e.key.region().Disk).synced
}

// admit pins all regions of a span, adding those that are missing, or does
// nothing and reports false. It removes regions that may leave when it needs
// their room. Those added are not durable yet.
func (s *set) admit(sp span) (removed, added []key, ok bool) {
	for i := range sp.n {
		if e := s.entries[sp.first+key(i)]; e != nil {
			e.pins++ // so that it is not removed for the others
		} else {
			added = append(added, sp.first+key(i))
		}
	}
	if over := len(s.entries) + len(added) - s.max; over > 0 && len(added) > 0 {
		if removed = s.evict(over); len(removed) < over {
			for i := range sp.n {
				if e := s.entries[sp.first+key(i)]; e != nil {
					e.pins--
				}
			}
			return removed, nil, false
		}
	}
	for _, k := range added {
		s.entries[k] = &entry{key: k, pins: 1}
	}
	return removed, added, true
}

// evict removes regions that may leave, those written longest ago first: n if
// there are so many, and more, up to an eighth of the set, so that it need not
// be done for each region anew.
func (s *set) evict(n int) []key {
	var may []*entry
	for _, e := range s.entries {
		if s.mayLeave(e) {
			may = append(may, e)
		}
	}
	slices.SortFunc(may, func(a, b *entry) int {
		return cmp.Or(cmp.Compare(a.written, b.written), cmp.Compare(a.key, b.key))
	})
	out := make([]key, 0, len(may))
	for _, e := range may[:min(len(may), max(n, s.max/8))] {
		delete(s.entries, e.key)
		out = append(out, e.key)
	}
	return out
}

// unsynced reports that a disk was written after its newest fdatasync began.
func (s *set) unsynced() bool {
	for _, d := range s.disks {
		if d.written > d.begun {
			return true
		}
	}
	return false
}

func (s *set) pinned() bool {
	for _, e := range s.entries {
		if e.pins > 0 {
			return true
		}
	}
	return false
}

func (s *set) keys() []key {
	out := make([]key, 0, len(s.entries))
	for k := range s.entries {
		out = append(out, k)
	}
	slices.Sort(out)
	return out
}
