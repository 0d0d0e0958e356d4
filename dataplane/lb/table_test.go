// SPDX-License-Identifier: Apache-2.0

package lb

import (
	"math/rand/v2"
	"testing"
)

// mustTable makes a table in ordinary memory.
func mustTable(t *testing.T, buckets int) *table {
	t.Helper()
	table, err := newTable(make([]byte, (buckets+1)*bucketSize))
	if err != nil {
		t.Fatal(err)
	}
	return table
}

func numberedKey(n int) (k key) {
	k[0], k[1], k[2], k[5], k[6] = 10, byte(n>>8), byte(n), 80, byte(TCP)
	return k
}

// Whatever is inserted and removed, a table holds what it should and nothing else, and an empty one has no deleted entry
// left but in a bucket that was full.
func FuzzTable(f *testing.F) {
	f.Add([]byte{0, 1, 2, 1, 0, 2})
	seed := make([]byte, 3000)
	random := rand.New(rand.NewPCG(1, 2))
	for i := range seed {
		seed[i] = byte(random.Uint32())
	}
	f.Add(seed)

	f.Fuzz(func(t *testing.T, steps []byte) {
		// Each step inserts the key of its number, or removes it if it is there: at most 100 of 128 entries.
		table := mustTable(t, 2)
		held := map[key]*entry{}
		for _, step := range steps {
			k := numberedKey(int(step) % 100)
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
				if e[entryKey] == emptyKey {
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
	for _, services := range []int{64, 1000, 1 << 16} {
		for range 5 {
			table := mustTable(t, tableBuckets(services))
			probes := 0
			for i := range services {
				k := key{10, 96 + byte(i>>16), byte(i >> 8), byte(i), 0, 80, byte(TCP)}
				e := table.place(k)
				if e == nil {
					t.Fatalf("%d Services, seed %#x: number %d has no room", services, table.seed, i)
				}
				table.insert(e, k)
				for p := range table.probe(k) {
					probes++
					if p == e {
						break
					}
				}
			}
			if mean := float64(probes) / float64(services); mean > 2 {
				t.Errorf("%d Services, seed %#x: a look-up takes %.2f probes", services, table.seed, mean)
			}
		}
	}
}
