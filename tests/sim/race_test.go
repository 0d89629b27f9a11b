//go:build race

package sim

// raceEnabled: the race detector makes a run about fifteen times slower.
const raceEnabled = true
