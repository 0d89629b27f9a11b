package host

import (
	"slices"
	"testing"
)

var (
	allStates = []State{Syncing, Streaming, Stalled, Resyncing, Detached, Fenced, Waiting, Receiving, Promoting, Failed, Undeclared}
	allInputs = []Input{LinkLost, Attached, SyncBegun, SyncEnded, ResyncBegun, ResyncEnded, Superseded, SourceCame, SourceLeft, PromoteBegun, PromoteUndo, Promoted, Returned, Mirrored, Chosen, Broken}
)

// TestStateMachine looks at every state, input and authority.
func TestStateMachine(t *testing.T) {
	source := []State{Syncing, Streaming, Stalled, Resyncing, Fenced, Failed}
	for _, from := range allStates {
		for _, in := range allInputs {
			for _, may := range []Authority{false, true} {
				to, err := Next(from, in, may)
				switch {
				case in == Broken && (to != Failed || err != nil):
					t.Errorf("%s + %s: %s, %v; a broken group is failed", from, in, to, err)
				case err != nil && to != from:
					t.Errorf("%s + %s: refused, but the state changed to %s", from, in, to)
				case from == Failed && to != Failed:
					t.Errorf("%s + %s: left the failed state", from, in)
				case from == Undeclared && to != Undeclared && to != Failed && to != Leaving:
					t.Errorf("%s + %s: a group that is not declared became %s", from, in, to)
				case from == Fenced && to == Waiting && in == Returned: // it serves nothing
				case from == Fenced && to == Detached && in == Chosen && bool(may): // an operator wants it
				case from == Fenced && to != Fenced && to != Failed:
					t.Errorf("%s + %s: a fenced source came back as %s", from, in, to)
				case to == Detached && from != Detached && (in != Promoted || !bool(may)):
					t.Errorf("%s + %s (authority %v): began to serve", from, in, may)
				case slices.Contains(source, from) && !slices.Contains(source, to):
					t.Errorf("%s + %s: a source became %s", from, in, to)
				}
			}
		}
	}
}

// TestEveryStateIsReached and left where that is meant: no dead entry in the table.
func TestEveryStateIsReached(t *testing.T) {
	reached := map[State]bool{Stalled: true, Waiting: true, Undeclared: true} // where groups begin
	for range allStates {
		for from := range reached {
			for _, in := range allInputs {
				if to, err := Next(from, in, true); err == nil {
					reached[to] = true
				}
			}
		}
	}
	for _, s := range allStates {
		if !reached[s] {
			t.Errorf("state %s cannot be reached", s)
		}
	}
}
