// The soak plays random rounds (package rounds) one after another, each with a
// seed of its own, until one fails or all are done. `make soak` runs it; it
// needs root.
package main

import (
	"context"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"
	"time"

	"kagami/tests/e2e/soak/rounds"
)

func main() {
	kagami := flag.String("kagami", "bin/kagami", "the kagami binary")
	n := flag.Int("rounds", 10, "how many rounds to play; 0: without end")
	seed := flag.Uint64("seed", rand.Uint64()>>16, "seed of the first round; the others follow from it")
	faults := flag.Int("faults", 0, "faults in a round before the disaster; 0: a few")
	keepOn := flag.Bool("keep-going", false, "go on after a round that failed")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	path, err := filepath.Abs(*kagami)
	if err != nil {
		fmt.Fprintln(os.Stderr, "soak:", err)
		os.Exit(1)
	}
	failed := 0
	for i := 0; (i < *n || *n == 0) && ctx.Err() == nil; i++ {
		s := *seed + uint64(i)
		fmt.Printf("── round %d, seed %d\n", i+1, s)
		if err := play(ctx, rounds.RoundOptions{Kagami: path, Seed: s, Faults: *faults, Out: os.Stdout}); err != nil {
			failed++
			fmt.Fprintln(os.Stderr, "soak:", err)
			if !*keepOn {
				break
			}
		}
	}
	if failed > 0 {
		stop()
		os.Exit(1)
	}
}

// patience bounds one round.
const patience = 4 * time.Minute

func play(ctx context.Context, o rounds.RoundOptions) error {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	return rounds.Round(ctx, o)
}
