package jbd2

// TID is a transaction's ID. IDs wrap at 2^32 and are ordered modulo 2^32:
// use After, never <.
type TID uint32

// After reports whether a is newer than b.
func (a TID) After(b TID) bool { return int32(a-b) > 0 }
