//go:build !race

package changemap

const raceEnabled = false
