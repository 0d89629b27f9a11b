package acked

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"time"
)

// Workload is a set of writers at work, one goroutine each.
//
// pause is held for reading by an operation under way, and for writing while
// the workload is paused.
type Workload struct {
	ledger *Ledger
	stop   chan struct{}
	once   sync.Once
	wg     sync.WaitGroup
	pause  sync.RWMutex

	mu   sync.Mutex
	errs []error
}

// Start makes dir, which must not exist, lays out the writers' files durably,
// and lets the writers go. The ledger must be new.
func Start(dir string, l *Ledger) (*Workload, error) {
	if err := os.Mkdir(dir, 0o755); err != nil {
		return nil, fmt.Errorf("workload: %w", err)
	}
	w := &Workload{ledger: l, stop: make(chan struct{})}
	workers := make([]worker, len(l.config.Writers))
	for i := range workers {
		workers[i] = l.config.worker(i)
		if err := workers[i].prepare(dir); err != nil {
			return nil, fmt.Errorf("workload: prepare writer %d: %w", i, err)
		}
	}
	// The folder itself must survive, and the names in it.
	for _, d := range []string{dir, filepath.Dir(dir)} {
		if err := syncDir(d); err != nil {
			return nil, fmt.Errorf("workload: %w", err)
		}
	}
	for i, k := range workers {
		w.wg.Go(func() { w.run(i, k) })
	}
	return w, nil
}

func (w *Workload) run(i int, k worker) {
	err := w.work(i, k)
	// Nothing is promised by close, and after an error it fails too.
	if cerr := k.close(); err == nil && cerr != nil {
		err = cerr
	}
	if err != nil {
		w.mu.Lock()
		w.errs = append(w.errs, fmt.Errorf("writer %d: %w", i, err))
		w.mu.Unlock()
	}
}

func (w *Workload) work(i int, k worker) error {
	for n := uint64(1); n <= uint64(w.ledger.config.MaxOps); n++ {
		if w.stopped(w.ledger.config.Pause) {
			return nil
		}
		if err := w.step(i, k, n); err != nil {
			return fmt.Errorf("operation %d: %w", n, err)
		}
	}
	return nil
}

// stopped waits for the pause between two operations.
func (w *Workload) stopped(pause time.Duration) bool {
	if pause == 0 {
		select {
		case <-w.stop:
			return true
		default:
			return false
		}
	}
	select {
	case <-w.stop:
		return true
	case <-time.After(pause):
		return false
	}
}

func (w *Workload) step(i int, k worker, n uint64) error {
	w.pause.RLock()
	defer w.pause.RUnlock()
	w.ledger.issue(i, n)
	if err := k.perform(n); err != nil {
		return err
	}
	return w.ledger.ack(i, time.Now())
}

// Pause waits for the operations under way and holds back new ones, until
// Resume. It waits for as long as the file system does.
func (w *Workload) Pause() { w.pause.Lock() }

// Resume ends a Pause.
func (w *Workload) Resume() { w.pause.Unlock() }

// Stop asks the writers to end after the operation under way, waits for them,
// and returns the errors at which writers ended.
func (w *Workload) Stop() error {
	w.once.Do(func() { close(w.stop) })
	return w.Wait()
}

// Wait waits until every writer has ended, by an error, by Stop or after
// MaxOps, and returns the errors. After a disaster all writers end by errors.
func (w *Workload) Wait() error {
	w.wg.Wait()
	w.mu.Lock()
	defer w.mu.Unlock()
	return errors.Join(w.errs...)
}
