// Package control is the control API: HTTP with JSON on a unix socket, its
// server and its client. Whoever may open the socket may do everything; its
// mode is 0660 and its group comes from the config file.
//
//	GET  /v1/version    Version
//	GET  /v1/status     Status
//	POST /v1/protect    ProtectRequest   → stream, no result
//	POST /v1/unprotect  UnprotectRequest → stream, no result
//	POST /v1/failover   FailoverRequest  → stream, FailoverReport
//	POST /v1/forget     ForgetRequest    → stream, no result
//	POST /v1/verify     VerifyRequest    → stream, VerifyReport
//	POST /v1/reprotect  ReprotectRequest → stream, no result
//	POST /v1/switchover SwitchoverRequest → stream, FailoverReport
//	POST /v1/failback   SwitchoverRequest → stream, FailoverReport
//	POST /v1/survivor   SurvivorRequest  → stream, no result
//	POST /v1/branches   BranchesRequest  → list of Branch
//	POST /v1/set        SetRequest       → Policy
//	GET  /metrics       Prometheus text
//
// A stream is NDJSON: one Event per line while the operation runs, then one
// last line, {"result": …} or {"error": Error}. A stream that ends without it
// was broken off. Requests that cannot be begun are answered with a status
// of 400 or more and {"error": Error}. A client that reads slowly does not slow
// the operation: progress it has not read is replaced by newer progress.
//
// When the client of a running operation goes away:
//
//   - protect and unprotect are cancelled, and roll back; verify is cancelled; of
//     reprotect only the waiting ends;
//   - failover, switchover, failback, survivor and forget go on, because half of either helps nobody. The
//     outcome is in the status.
//
// When the server is closed, all of them are cancelled and waited for.
//
// Goroutines: one per connection (bounded), one per running stream that
// writes to the client; Close waits for all.
package control

// Version is the answer of /v1/version.
type Version struct {
	Version string `json:"version"`
	API     int    `json:"api"`
}

// APIVersion is the version of this API; it is also the v1 of the paths.
const APIVersion = 1
