// SPDX-License-Identifier: Apache-2.0

package lb

import (
	"net/netip"
	"testing"
)

// mustTable makes a table in ordinary memory.
func mustTable(t *testing.T, buckets, keyWords int) *table {
	t.Helper()
	table := newTable(make([]byte, (buckets+1)*bucketSize), keyWords)
	if err := table.seed(); err != nil {
		t.Fatal(err)
	}
	return table
}

// numbered is a frontend of the family with so many words to a key.
func numbered(n, keyWords int) Frontend {
	address := netip.AddrFrom4([4]byte{10, 96 + byte(n>>16), byte(n >> 8), byte(n)})
	if keyWords == keyWords6 {
		address = netip.AddrFrom16([16]byte{0xfd, 13: byte(n >> 16), 14: byte(n >> 8), 15: byte(n)})
	}
	return Frontend{Address: netip.AddrPortFrom(address, 80), Protocol: TCP}
}

func TestKeys(t *testing.T) {
	for _, keyWords := range []int{keyWords4, keyWords6} {
		for _, protocol := range []Protocol{TCP, UDP} {
			f := numbered(0x10203, keyWords)
			f.Protocol = protocol
			if got := keyOf(f).frontend(); got != f {
				t.Errorf("want %v, got %v", f, got)
			}
		}
	}
}

// Whatever is inserted and removed, a table holds what it should and nothing else, and an empty one has no deleted entry
// left but in a bucket that was full.
func FuzzTable(f *testing.F) {
	f.Add([]byte{0, 1, 2, 1, 0, 2})
	f.Add(randomSteps(3000))

	f.Fuzz(func(t *testing.T, steps []byte) {
		keyWords := keyWords4
		if len(steps)%2 == 1 {
			keyWords = keyWords6
		}
		// Each step inserts the key of its number, or removes it if it is there: at most 100 of 128 entries.
		table := mustTable(t, 2, keyWords)
		held := map[key]*entry{}
		for _, step := range steps {
			k := keyOf(numbered(int(step)%100, keyWords))
			e := table.find(k)
			if e != held[k] {
				t.Fatalf("key %v is at %p, want %p", k, e, held[k])
			}
			if e != nil {
				table.remove(e, k)
				delete(held, k)
				continue
			}
			if e = table.place(k); e == nil {
				continue // its bucket is full
			}
			table.insert(e, k)
			held[k] = e
		}
		if table.used != len(held) {
			t.Errorf("used: want %d, got %d", len(held), table.used)
		}
		for k, e := range table.all() {
			if held[k] != e {
				t.Errorf("key %v is at %p, want %p", k, e, held[k])
			}
			table.remove(e, k)
			delete(held, k)
		}
		if len(held) > 0 || table.used != 0 {
			t.Errorf("not listed: %v", held)
		}
		for b := range table.buckets {
			free := 0
			for _, e := range table.buckets[b] {
				if e[0] == emptyKey {
					free++
				}
			}
			if free != bucketEntries && free != 0 {
				t.Errorf("bucket %d: %d of %d entries are empty", b, free, bucketEntries)
			}
		}
	})
}

// With the tables that options lead to, whatever the seed, no bucket of neighbouring Services is full and look-ups are
// short.
func TestTableSpreads(t *testing.T) {
	for _, keyWords := range []int{keyWords4, keyWords6} {
		for _, services := range []int{64, 1000, 1 << 16} {
			for range 3 {
				table, probes := mustTable(t, tableBuckets(services), keyWords), 0
				for i := range services {
					k := keyOf(numbered(i, keyWords))
					e := table.place(k)
					if e == nil {
						t.Fatalf("%d Services, seeds %#x: number %d has no room", services, table.seeds, i)
					}
					table.insert(e, k)
					for p := range table.probe(k) {
						probes++
						if p == e {
							break
						}
					}
				}
				// 1.5 is what half a table gives; the small one has its luck.
				if mean := float64(probes) / float64(services); mean > 2 && services > 64 || mean > 6 {
					t.Errorf("%d Services, seeds %#x: a look-up takes %.2f probes", services, table.seeds, mean)
				}
			}
		}
	}
}
