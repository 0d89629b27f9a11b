package nbd

// Extent is a run of bytes for base:allocation.
type Extent struct {
	Length int64
	Hole   bool // no space is allocated
	Zero   bool // reads as zeros
}

// Device is what one export serves. Offsets and lengths are bytes, already
// checked against Size by the server. All methods are safe for concurrent use
// and may block for as long as the device is stalled; the server never holds a
// lock across them.
//
// An error that wraps a syscall.Errno is sent to the client as that error
// (ESHUTDOWN excepted); any other error is sent as EIO, but for ErrGone.
type Device interface {
	// Size is the device's length in bytes. It does not change while a client is attached.
	Size() int64
	// Opened is called when a client enters transmission, before its first
	// request; Closed when that client is gone and none of its requests is running.
	Opened()
	Closed()
	// WouldBlock reports that a request might wait for something other than
	// the local image just now (queue full, link lost, not ready after a
	// restart). The server then runs requests in goroutines of their own, so
	// that one connection's reads go on. It is a hint.
	WouldBlock() bool
	// ReadAt fills p. It must not retain p.
	ReadAt(p []byte, off int64) error
	// WriteAt writes p; with fua it returns only when this write is durable.
	// It must not retain p.
	WriteAt(p []byte, off int64, fua bool) error
	// WriteZeroes makes [off, off+n) read as zeros; noHole asks to keep the space.
	WriteZeroes(off, n int64, noHole, fua bool) error
	// Trim discards [off, off+n); it reads as zeros afterwards.
	Trim(off, n int64, fua bool) error
	// Flush returns when every write, zero and trim replied to (on any
	// connection) before the call is durable.
	Flush() error
	// Extents describes [off, off+n) from its start; it may stop early, but
	// covers at least one byte.
	Extents(off, n int64) ([]Extent, error)
}
