package config

import (
	"math"
	"testing"
	"time"
)

func TestParseSize(t *testing.T) {
	good := map[string]int64{
		"0": 0, "0B": 0, "1B": 1, "512B": 512, "1KiB": 1 << 10, "3MiB": 3 << 20, "10GiB": 10 << 30, "2TiB": 2 << 40,
		"8388607TiB": 8388607 << 40, "9223372036854775807B": math.MaxInt64, "007MiB": 7 << 20,
	}
	for s, want := range good {
		if n, err := ParseSize(s); err != nil || n != want {
			t.Errorf("%s: %d, %v", s, n, err)
		}
	}
	for _, s := range []string{"", "1", "B", "-1B", "+1B", "1.5GiB", "1 GiB", " 1GiB", "1GB", "1gib", "8388608TiB", "9223372036854775808B", "1e3B", "0x1B", "١B"} {
		if n, err := ParseSize(s); err == nil {
			t.Errorf("%q is accepted as %d", s, n)
		}
	}
}

func TestFormatSizeIsExact(t *testing.T) {
	for _, n := range []int64{0, 1, 511, 512, 1023, 1024, 1025, 1 << 20, 1<<20 + 1, 5 << 30, 1 << 40, 1<<40 + 1<<30, math.MaxInt64} {
		if back, err := ParseSize(FormatSize(n)); err != nil || back != n {
			t.Errorf("%d is written %s and read %d, %v", n, FormatSize(n), back, err)
		}
	}
}

func TestFormatDuration(t *testing.T) {
	for d, want := range map[time.Duration]string{
		0: "0s", time.Second: "1s", 90 * time.Second: "1m30s", time.Minute: "1m", time.Hour: "1h", 90 * time.Minute: "1h30m",
		time.Hour + time.Second: "1h0m1s", 250 * time.Millisecond: "250ms", 10 * time.Minute: "10m", 720 * time.Hour: "720h",
	} {
		got := FormatDuration(d)
		if back, err := time.ParseDuration(got); got != want || err != nil || back != d {
			t.Errorf("%v is written %s, want %s", d, got, want)
		}
	}
}
