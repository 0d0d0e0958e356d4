// SPDX-License-Identifier: Apache-2.0

package lb

import (
	"crypto/rand"
	"encoding/binary"
	"fmt"
	"iter"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"
)

// An entry is one frontend in a services map: its key, its word, and for IPv4 room for two sets of backends, so that a
// change writes one while connects read the other. See services.h. It is a cache line.
type entry [entryWords]uint64

const (
	entryWords  = 8
	firstInline = 2 // base of the one set of backends in an entry of IPv4
	otherInline = firstInline + maxInline
	maxInline   = 3 // backends that it has room for, twice

	affinityID      = 6 // of both IP versions, where it has no backends
	affinityTimeout = 7

	bucketEntries = 64
	bucketSize    = bucketEntries * entryWords * 8
)

// What stands in place of the first word of a key where there is none. Neither is that of a frontend: one has no port, the
// other a scope that does not exist.
const (
	emptyKey   = 0         // ends a look-up
	deletedKey = 1<<64 - 1 // does not
)

// A table is the services map of a family, whose memory this process shares with the programs: a hash table with open
// addressing, in buckets of one page each. Only one process writes, and every write that counts is one word, so that a
// look-up at any moment finds a frontend whole or not at all. Entries never move.
//
// Note: a hash map of the kernel was the first plan. Its bucket, its element and the backends each lie in a page of their
// own; here one page and one cache line are read, which matters most where system calls empty the TLB (docs/method.md).
type table struct {
	keyWords int
	memory   []byte
	buckets  [][bucketEntries]entry
	seeds    []uint64 // odd, as many as keyWords; in memory
	used     int      // entries that hold a frontend
	inside   int      // those of them that are for clients inside the cluster
}

// tableBuckets is how many buckets, a power of two, keep the table half empty with so many frontends.
func tableBuckets(services int) int {
	return roundUpPowerOfTwo((2*services + bucketEntries - 1) / bucketEntries)
}

// newTable makes a table of the memory of a map. The element after the buckets keeps the seeds.
func newTable(memory []byte, keyWords int) *table {
	n := len(memory)/bucketSize - 1
	all := unsafe.Slice((*[bucketEntries]entry)(unsafe.Pointer(unsafe.SliceData(memory))), n+1)
	return &table{keyWords: keyWords, memory: memory, buckets: all[:n], seeds: all[n][0][:keyWords]}
}

// seed draws the seeds of a table whose map is new.
func (t *table) seed() error {
	for i := range t.seeds {
		if t.seeds[i] != 0 {
			continue
		}
		var random [8]byte
		if _, err := rand.Read(random[:]); err != nil {
			return fmt.Errorf("seeds of the services map: %w", err)
		}
		t.seeds[i] = binary.NativeEndian.Uint64(random[:]) | 1
	}
	return nil
}

// close gives the memory back. Only used may be read afterwards.
func (t *table) close() error {
	if t.memory == nil {
		return nil
	}
	err := unix.Munmap(t.memory)
	t.memory, t.buckets, t.seeds = nil, nil, nil
	return err
}

// hash is the same as the programs'.
func (t *table) hash(k key) (h uint64) {
	for i, seed := range t.seeds {
		h += k[i] * seed
	}
	h = (h ^ h>>33) * 0xff51afd7ed558ccd
	return (h ^ h>>33) * 0xc4ceb9fe1a85ec53
}

// owner is what marks the word and the backends of a frontend as its own. The programs compute the same.
//
// Note: a generation that grows with each change was the first plan. It tells that a word is old, which does no harm, but
// not that a recycled entry or region now belongs to another Service, which does.
func (t *table) owner(k key) uint64 { return t.hash(k)>>16&0xffff | 1 }

// bucket is where keys with this hash are.
func (t *table) bucket(hash uint64) *[bucketEntries]entry {
	return &t.buckets[hash>>40&uint64(len(t.buckets)-1)]
}

// probe lists the entries where k may be, in the order in which they are looked at.
func (t *table) probe(k key) iter.Seq[*entry] {
	h := t.hash(k)
	bucket, start := t.bucket(h), h>>34
	return func(yield func(*entry) bool) {
		for i := range uint64(bucketEntries) {
			if !yield(&bucket[(start+i)%bucketEntries]) {
				return
			}
		}
	}
}

// find gives the entry of a frontend, or nil.
func (t *table) find(k key) *entry {
	for e := range t.probe(k) {
		if e[0] == emptyKey {
			return nil
		}
		if t.keyOf(e) == k {
			return e
		}
	}
	return nil
}

// keyOf is the key of an entry that holds a frontend.
func (t *table) keyOf(e *entry) (k key) {
	copy(k[:], e[:t.keyWords])
	return k
}

// place gives a free entry for a frontend that has none yet, or nil if its bucket is full. The frontend has it once
// insert was called.
//
// Half full, as tableBuckets has it, one bucket in some ten millions is full.
func (t *table) place(k key) *entry {
	for e := range t.probe(k) {
		if e.free() {
			return e
		}
	}
	return nil
}

// insert gives a frontend the entry from place, whose word and backends are written already.
func (t *table) insert(e *entry, k key) {
	for i := t.keyWords - 1; i >= 0; i-- {
		atomic.StoreUint64(&e[i], k[i])
	}
	t.count(k, 1)
}

// count notes that a frontend came or went.
func (t *table) count(k key, n int) {
	t.used += n
	if k.frontend().Scope == Inside {
		t.inside += n
	}
}

// remove takes a frontend's entry from it. What is behind an entry is still found, and so it becomes empty only if there
// is nothing; else look-ups, and the deleted ones before it, would grow for ever.
func (t *table) remove(e *entry, k key) {
	atomic.StoreUint64(&e[0], deletedKey)
	t.count(k, -1)
	bucket := t.bucket(t.hash(k))
	at := (uintptr(unsafe.Pointer(e)) - uintptr(unsafe.Pointer(bucket))) / unsafe.Sizeof(*e)
	for next := &bucket[(at+1)%bucketEntries]; next[0] == emptyKey && e[0] == deletedKey; {
		atomic.StoreUint64(&e[0], emptyKey)
		next, at = e, (at+bucketEntries-1)%bucketEntries
		e = &bucket[at]
	}
}

// all lists the frontends with their entries, in no order.
func (t *table) all() iter.Seq2[key, *entry] {
	return func(yield func(key, *entry) bool) {
		for b := range t.buckets {
			for i := range t.buckets[b] {
				if e := &t.buckets[b][i]; !e.free() && !yield(t.keyOf(e), e) {
					return
				}
			}
		}
	}
}

func (e *entry) free() bool { return e[0] == emptyKey || e[0] == deletedKey }

// word is where the backends of a frontend's entry are.
func (t *table) word(e *entry) word { return word(e[t.keyWords]) }

// publish makes the backends that a word leads to those of the frontend.
func (t *table) publish(e *entry, w word) { atomic.StoreUint64(&e[t.keyWords], uint64(w)) }
