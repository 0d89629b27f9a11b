package host

import "fmt"

// State of a group at a site.
type State string

// The states of a source (first block), of a replica (second), and of either.
const (
	Syncing   State = "syncing"   // the first sync runs: unprotected
	Streaming State = "streaming" // every FLUSH is answered by both sites
	Stalled   State = "stalled"   // the link is lost: FLUSH waits
	// Disconnected: the replica is away and the group goes on without it: FLUSH is answered by this site alone.
	Disconnected State = "disconnected"
	// CatchingUp: what was written while the replica was away is sent in order; FLUSH is still answered by this site alone.
	CatchingUp State = "catching up"
	Resyncing  State = "resyncing"  // regions that may differ are compared and shipped
	Detached   State = "unmirrored" // promoted and serving, without a replica
	Fenced     State = "fenced"     // superseded by a promotion elsewhere: serves nothing
	Leaving    State = "leaving"    // ended here: serves nothing; the replica's site has to be told
	// Undeclared: the config file declares the group's disks no more. It serves
	// nothing, and only a start of the daemon leads in or out.
	Undeclared State = "undeclared"

	Waiting   State = "waiting"   // no source is attached
	Receiving State = "receiving" // a source is attached
	Promoting State = "promoting" // a failover is under way

	Failed State = "failed"
)

// Input is something that happened to a group.
type Input string

// Inputs of the state machine.
const (
	LinkLost     Input = "link lost"
	WentOn       Input = "went on alone"
	Attached     Input = "attached" // the replica follows the stream
	SyncBegun    Input = "first sync begun"
	SyncEnded    Input = "first sync ended"
	CatchUpBegun Input = "catching up begun"
	CaughtUp     Input = "caught up"
	ResyncBegun  Input = "resync begun"
	ResyncEnded  Input = "resync ended"
	Superseded   Input = "superseded" // the other site was promoted
	SourceCame   Input = "source attached"
	SourceLeft   Input = "source left"
	PromoteBegun Input = "promotion begun"
	PromoteUndo  Input = "promotion given up"
	Promoted     Input = "promoted"
	Released     Input = "replica given up" // an operator ends the group while its replica is not there
	Returned     Input = "returned"         // what was a source becomes the replica of the other site
	Mirrored     Input = "mirrored"         // a promoted group takes the other site as its replica
	Chosen       Input = "chosen"           // an operator lets this site's data survive, not the other's
	Ended        Input = "ended"            // no VM uses the group any more
	Broken       Input = "failed"
)

// transitions is the whole machine. What is not listed is refused, but for
// Broken and Ended, which lead to Failed and Leaving from everywhere, and
// inputs that change nothing.
var transitions = map[State]map[Input]State{
	Syncing:   {LinkLost: Stalled, Attached: Syncing, SyncBegun: Syncing, SyncEnded: Streaming, ResyncBegun: Resyncing, Superseded: Fenced, Released: Detached},
	Streaming: {LinkLost: Stalled, Attached: Streaming, SyncBegun: Syncing, ResyncBegun: Resyncing, Superseded: Fenced, Released: Detached},
	Stalled:   {CatchUpBegun: CatchingUp, LinkLost: Stalled, WentOn: Disconnected, Attached: Streaming, SyncBegun: Syncing, ResyncBegun: Resyncing, Superseded: Fenced, Released: Detached},
	// A refused attachment is a lost link, too.
	Disconnected: {CatchUpBegun: CatchingUp, WentOn: Disconnected, LinkLost: Stalled, SyncBegun: Syncing, ResyncBegun: Resyncing, Superseded: Fenced, Released: Detached},
	CatchingUp:   {CatchUpBegun: CatchingUp, CaughtUp: Streaming, WentOn: Disconnected, LinkLost: Stalled, SyncBegun: Syncing, ResyncBegun: Resyncing, Superseded: Fenced, Released: Detached},
	Resyncing:    {LinkLost: Stalled, ResyncBegun: Resyncing, ResyncEnded: Streaming, Superseded: Fenced, Released: Detached},
	Detached:     {Released: Detached, Mirrored: Stalled, Returned: Waiting},
	Fenced:       {LinkLost: Fenced, Superseded: Fenced, Returned: Waiting, Chosen: Detached},
	Leaving:      {LinkLost: Leaving},
	// Undeclared takes nothing.
	Waiting:   {SourceCame: Receiving, SourceLeft: Waiting, PromoteBegun: Promoting},
	Receiving: {SourceCame: Receiving, SourceLeft: Waiting, PromoteBegun: Promoting},
	Promoting: {SourceLeft: Promoting, PromoteBegun: Promoting, PromoteUndo: Waiting, Promoted: Detached},
	Failed:    {LinkLost: Failed, SourceLeft: Failed},
}

// Authority says whether this site may serve the group. It is true for every
// operator's command; a lease will provide it for automatic failover.
type Authority bool

// Next is the state machine: pure, total, the same for every group. Inputs
// that lead to serving need authority.
func Next(from State, in Input, may Authority) (State, error) {
	switch in {
	case Broken:
		return Failed, nil
	case Ended:
		return Leaving, nil
	}
	to, ok := transitions[from][in]
	if !ok {
		return from, fmt.Errorf("a group that is %s cannot take %q", from, in)
	}
	if (in == PromoteBegun || in == Promoted || in == Released || in == Chosen || in == WentOn) && !may {
		return from, fmt.Errorf("this site has no authority to serve the group")
	}
	return to, nil
}
