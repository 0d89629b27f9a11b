// Package spool is the replica's journal on disk: records in segment files,
// made durable by one fdatasync per group of epochs.
package spool
