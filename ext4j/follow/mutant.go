package follow

// Mutant is a rule to break, for tests that must notice.
type Mutant uint8

// The mutants: the naive versions of the rules that DESIGN.md names, and others.
const (
	None          Mutant = iota
	SinceFlush           // judge only what came since the last FLUSH was answered
	StaleView            // never update the view: what was free at the start stays so
	KeepChain            // go on after an unmount, a new client, an empty log
	IgnoreHome           // a copy stays the committed one though its home was written otherwise
	IgnoreRevoke         // a revoked copy stays the committed one
	IgnoreCommit         // a commit block is a log block like others
	AlwaysLive           // LIVE needs no superblock state, features or checksums
	RawFree              // every block that is not known to be in use is free
	NoBefore             // a tail append need not leave the committed bytes alone
	TrustTail            // the log's tail may move before the copies it drops are home
	IgnoreJournal        // what overwrites the log's committed part is a log block like others
	mutants
)

// Mutants are all of them.
func Mutants() []Mutant {
	var m []Mutant
	for i := None + 1; i < mutants; i++ {
		m = append(m, i)
	}
	return m
}

func (m Mutant) String() string {
	return [...]string{"none", "since flush", "stale view", "keep chain", "ignore home", "ignore revoke", "ignore commit",
		"always live", "raw free", "no before", "trust tail", "ignore journal"}[m%mutants]
}
