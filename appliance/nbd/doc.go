// Package nbd is an NBD server: the protocol and nothing else. What an export
// holds is a Device.
//
// A connection goes through these states; any error leads to the end:
//
//	accepted ── greeting, client flags ──▶ haggling ─┐ LIST INFO STRUCTURED_REPLY
//	                                          │  ▲───┘ *_META_CONTEXT, unknown ones
//	                         GO, EXPORT_NAME  │  └ at most maxOptions, HandshakeTimeout
//	                                          ▼
//	   ABORT ──▶ end                       entered   (counts against MaxClients)
//	                                          │ no change of a lost connection is running any more
//	                                          ▼
//	                                Device.Opened, transmission
//	                                          │ DISC, hang-up, error, ErrGone, Close, Remove
//	                                          ▼
//	                        retired: no new request ── running ones return ──▶ Device.Closed, end
//
// # Goroutines
//
// Each connection has one, its reader. It runs a request itself, inline, when
// that cannot block: no FLUSH, no FUA, no large zero, trim or block status,
// and nothing at all while Device.WouldBlock says so. Other requests get a
// goroutine each. Replies of inline requests are batched and sent before the
// reader waits for more input. Server.Serve waits for the readers, each reader
// for its requests.
//
// # Invariants
//
//   - A reply is written to the socket in one piece; requests complete in any order.
//   - Opened and Closed come in pairs, around every request of the client.
//   - A write whose payload did not arrive whole changes nothing if it is at
//     most 256 KiB long. A longer one is handed to the device in pieces of
//     that size as they arrive, so a client that hangs up in its middle leaves a
//     part of it, as a disk does on power loss.
//   - A client that enters transmission waits until no write, zero or trim of
//     a connection that has been lost is still running in the device: its
//     client may have sent it again, and the older copy must not land on top
//     of what was written since. The hang-up of other connections is looked up
//     (POLLRDHUP) at that moment, for their readers may not have seen it yet.
//   - A device that is closing down (ErrGone) gets no reply sent; nor does
//     anything running at Close. ESHUTDOWN is never sent.
//
// # Memory
//
// A connection in haggling has a buffer of 16 KiB; the oldest one beyond
// MaxHandshakes is dropped. In transmission it has that, one of 260 KiB once it sends that
// much at a time, and one of 256 KiB while replies are waiting to be sent.
// Requests that run beside the reader are charged against the server's part
// (MaxMemory) of a Budget that servers can have in common, and never before
// their payload has arrived: a client that announces 32 MiB and stalls holds
// nothing but its own buffer. When the budget is exhausted a connection goes
// on with one request (at most 256 KiB) at a time on a reserve of its own, so that one stalled
// device cannot bring others to a stop. Only a read above 256 KiB that must
// not be fragmented (simple replies, or the DF flag) waits for the budget then.
//
// # Trust
//
// Every client of a Server sees all its exports and shares its limits: use
// Servers of its own for each domain of trust (a VM), with a Part of one Budget
// in common. A Part smaller than the whole leaves something to the others
// however long its servers keep what they have.
//
// # Locks
//
// Order: Server.mu before conn.mu; conn.wmu before conn.mu. No lock is held
// across a call of a Device. conn.wmu is held across a write to the socket,
// which WriteTimeout bounds.
//
// Source of the protocol: https://github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md
package nbd
