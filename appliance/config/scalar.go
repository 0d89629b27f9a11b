package config

import (
	"errors"
	"fmt"
	"math"
	"strconv"
	"strings"
	"time"
)

// units of sizes, largest first.
var units = []struct {
	name  string
	bytes int64
}{{"TiB", 1 << 40}, {"GiB", 1 << 30}, {"MiB", 1 << 20}, {"KiB", 1 << 10}, {"B", 1}}

const sizeForm = "a size with its unit, such as 64MiB (B, KiB, MiB, GiB, TiB)"

// ParseSize reads a size in bytes: a whole number with the unit B, KiB, MiB,
// GiB or TiB, or 0. A bare number is refused: nobody can tell its unit.
func ParseSize(s string) (int64, error) {
	if s == "0" {
		return 0, nil
	}
	for _, u := range units {
		digits, ok := strings.CutSuffix(s, u.name)
		if !ok {
			continue
		}
		if !allDigits(digits) {
			break
		}
		n, err := strconv.ParseInt(digits, 10, 64)
		if err != nil || n > math.MaxInt64/u.bytes {
			return 0, fmt.Errorf("too large: at most %s", FormatSize(math.MaxInt64>>40<<40))
		}
		return n * u.bytes, nil
	}
	return 0, fmt.Errorf("allowed: %s", sizeForm)
}

// FormatSize writes n bytes in the form ParseSize reads, exactly.
func FormatSize(n int64) string {
	for _, u := range units {
		if n != 0 && n%u.bytes == 0 {
			return strconv.FormatInt(n/u.bytes, 10) + u.name
		}
	}
	return "0"
}

// FormatDuration writes d as time.ParseDuration reads it, without trailing
// zero units: 1h, not 1h0m0s.
func FormatDuration(d time.Duration) string {
	s := d.String()
	if strings.HasSuffix(s, "m0s") {
		s = strings.TrimSuffix(s, "0s")
	}
	if strings.HasSuffix(s, "h0m") {
		s = strings.TrimSuffix(s, "0m")
	}
	return s
}

func parseDuration(s string) (time.Duration, error) {
	d, err := time.ParseDuration(s)
	if err != nil {
		return 0, errors.New("allowed: a duration with its unit, such as 1s, 250ms or 1h")
	}
	return d, nil
}

func parseBool(s string) (bool, error) {
	switch s {
	case "true":
		return true, nil
	case "false":
		return false, nil
	}
	return false, errors.New("allowed: true or false")
}

func parseInt(s string) (int64, error) {
	if !allDigits(strings.TrimPrefix(s, "-")) {
		return 0, errors.New("allowed: a whole number")
	}
	n, err := strconv.ParseInt(s, 10, 32)
	if err != nil {
		return 0, errors.New("allowed: a whole number below 2147483648")
	}
	return n, nil
}

func allDigits(s string) bool {
	for _, c := range s {
		if c < '0' || c > '9' {
			return false
		}
	}
	return s != ""
}
