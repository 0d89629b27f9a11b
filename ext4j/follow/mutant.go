package follow

// Mutant is a rule to break, for tests that must notice.
type Mutant uint8

// The mutants: naive versions of the rules.
const (
	None          Mutant = iota
	AnyFlush             // no FLUSH promises anything
	SinceFlush           // judge only what came since the last FLUSH was answered
	StaleView            // never update the view from transactions
	KeepView             // never mind what is written to bitmaps and superblock outside the journal
	KeepCopies           // a committed copy stays one when the log's tail has passed it
	IgnoreRevoke         // a revoked copy stays the committed one
	IgnoreCommit         // a commit block is a log block like others
	AlwaysLive           // LIVE asks for nothing
	FastLog              // fast commits are log blocks like others
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
	return [...]string{"none", "any flush", "since flush", "stale view", "keep view", "keep copies", "ignore revoke", "ignore commit",
		"always live", "fast log", "no before", "trust tail", "ignore journal"}[m%mutants]
}
