package main

import (
	"encoding/json"
	"fmt"
	"strings"
	"time"

	"kagami/appliance/control"
)

// reporter shows how a long operation goes, on standard error: a bar that
// redraws itself on a terminal, lines otherwise. With json it writes every
// event to standard output instead, one per line, as the API sends them.
type reporter struct {
	a     *app
	json  bool
	bar   bool      // a bar is on the terminal's last line
	step  string    // of the last line printed
	line  time.Time // when that was
	tenth int64     // tenths of the step then done
}

// lineEvery is how often progress is printed when there is no terminal, unless
// another tenth is done.
const lineEvery = 10 * time.Second

// event shows one event.
func (r *reporter) event(e control.Event) {
	switch {
	case r.json:
		r.encode(e)
	case e.Total <= 0:
		r.clear()
		_, _ = fmt.Fprintf(r.a.err, "%-10s %s\n", e.Step, e.Message)
		r.step = e.Step
	case r.a.tty:
		_, _ = fmt.Fprintf(r.a.err, "\r%s\x1b[K", bar(e, r.a.width))
		r.bar = true
	default:
		r.progressLine(e)
	}
}

func (r *reporter) encode(v any) {
	data, err := json.Marshal(v)
	if err != nil {
		data = fmt.Appendf(nil, `{"error":{"message":%q}}`, err.Error())
	}
	r.a.printf("%s\n", data)
}

// progressLine prints progress where no bar can be drawn, but not each time.
func (r *reporter) progressLine(e control.Event) {
	now := r.a.now()
	tenth := tenths(e)
	if e.Step == r.step && tenth == r.tenth && now.Sub(r.line) < lineEvery {
		return
	}
	r.step, r.line, r.tenth = e.Step, now, tenth
	_, _ = fmt.Fprintf(r.a.err, "%-10s %s\n", e.Step, numbers(e))
}

// clear ends the bar's line; what it showed stays.
func (r *reporter) clear() {
	if r.bar {
		_, _ = fmt.Fprintln(r.a.err)
		r.bar = false
	}
}

// end shows the outcome in JSON, and gives an error on.
func (r *reporter) end(result any, err error) error {
	r.clear()
	if !r.json {
		return err
	}
	if err != nil {
		r.encode(map[string]any{"error": failed(err)})
		return err
	}
	r.encode(map[string]any{"result": result})
	return nil
}

// share is how much of e is done, 0 to 1.
func share(e control.Event) float64 {
	return min(1, max(0, float64(e.Done)/float64(e.Total)))
}

func tenths(e control.Event) int64 { return int64(share(e) * 10) }

// numbers writes progress as text.
func numbers(e control.Event) string {
	s := fmt.Sprintf("%3d%%  %s of %s", int(share(e)*100), size(e.Done), size(e.Total))
	if e.Rate > 0 {
		s += "  " + size(e.Rate) + "/s"
	}
	if e.ETASeconds > 0 && e.Done < e.Total {
		s += "  " + span(seconds(e.ETASeconds)) + " left"
	}
	return s
}

// bar draws progress in at most width columns.
func bar(e control.Event, width int) string {
	line := fmt.Sprintf("%-10s ", e.Step)
	// The bar's length depends on the width alone, so that it does not jump.
	if room := min(40, width-len("sync       []  ")-maxNumbers); room >= 10 {
		full := int(share(e) * float64(room))
		line += "[" + strings.Repeat("#", full) + strings.Repeat("-", room-full) + "]  "
	}
	text := []rune(line + numbers(e))
	return string(text[:min(len(text), max(0, width-1))])
}

// maxNumbers is room for numbers as they mostly are.
const maxNumbers = len("100%  100.9 MiB of 100.9 GiB  100.9 MiB/s  10m10s left")
