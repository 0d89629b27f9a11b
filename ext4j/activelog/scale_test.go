package activelog

// scale makes a number of seeds smaller under the race detector, which is slow
// and finds little in tests of one goroutine; they run without it too.
func scale[N int | int64 | uint64](n N) N {
	if raceEnabled {
		return max(1, n/6)
	}
	return n
}
