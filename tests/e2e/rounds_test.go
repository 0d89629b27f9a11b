package e2e

import (
	"context"
	"slices"
	"testing"
	"time"

	"kagami/tests/e2e/soak/rounds"
)

// play plays one round with a plan: loads on raw disks and in a file system,
// the faults, the loss of the main site, failover, every promise looked for,
// the old source's return.
func play(t *testing.T, plan ...rounds.Fault) {
	t.Helper()
	playWith(t, rounds.RoundOptions{Plan: plan})
}

func playWith(t *testing.T, o rounds.RoundOptions) {
	t.Helper()
	needRoot(t)
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	o.Kagami, o.Seed, o.Out = binary(t), seed(t), storyWriter{t}
	must(t, rounds.Round(ctx, o))
}

// TestSourceKilled: the workload on a live ext4 gets no error and goes on.
func TestSourceKilled(t *testing.T) {
	t.Parallel()
	play(t, slices.Repeat([]rounds.Fault{rounds.KillSource}, 3)...)
}

// TestReplicaKilled: the source stalls and goes on by itself.
func TestReplicaKilled(t *testing.T) {
	t.Parallel()
	play(t, slices.Repeat([]rounds.Fault{rounds.KillReplica}, 3)...)
}

// TestLine: cuts, half-open cuts and loss; it goes on by itself, over ten
// connections.
func TestLine(t *testing.T) {
	t.Parallel()
	playWith(t, rounds.RoundOptions{Connections: 10,
		Plan: []rounds.Fault{rounds.CutLine, rounds.CutHalf, rounds.Flap, rounds.Lossy, rounds.CutHalf}})
}

// TestPowerLoss: what the hosts of the daemons had not written to their disks
// is gone too.
func TestPowerLoss(t *testing.T) {
	t.Parallel()
	play(t, rounds.PowerSource, rounds.PowerReplica, rounds.PowerSource)
}

// TestRounds plays three random rounds; `make soak` plays more.
func TestRounds(t *testing.T) {
	t.Parallel()
	for range 3 {
		play(t)
	}
}
