//go:build !race

package ext4vectors

const everything = true
