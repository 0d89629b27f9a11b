//go:build race

package activelog

const raceEnabled = true
