package ext4j

import "sync"

// syncer gives every caller an fdatasync that began after its call, with one
// fdatasync for all who wait at the same time.
type syncer struct {
	run func() error // one fdatasync with its bookkeeping

	mu      sync.Mutex
	waiting []chan error // want an fdatasync that has not begun yet
	active  bool
	ended   error // the answer to every request once end was called
	wg      sync.WaitGroup
}

// request returns a channel that receives the result of an fdatasync begun
// after this call, or the error given to end.
func (s *syncer) request() <-chan error {
	done := make(chan error, 1)
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.ended != nil {
		done <- s.ended
		return done
	}
	s.waiting = append(s.waiting, done)
	if !s.active {
		s.active = true
		s.wg.Add(1)
		go s.loop()
	}
	return done
}

func (s *syncer) loop() {
	defer s.wg.Done()
	for {
		s.mu.Lock()
		batch := s.waiting
		s.waiting = nil
		if len(batch) == 0 {
			s.active = false
			s.mu.Unlock()
			return
		}
		s.mu.Unlock()
		err := s.run()
		for _, done := range batch {
			done <- err
		}
	}
}

// end refuses requests from now on with err and returns when no fdatasync runs.
func (s *syncer) end(err error) {
	s.mu.Lock()
	if s.ended == nil {
		s.ended = err
	}
	s.mu.Unlock()
	s.wg.Wait()
}
