// SPDX-License-Identifier: Apache-2.0

package lb

import (
	"math/rand/v2"
	"testing"
)

// randomSteps are n steps for a fuzz test to begin with, the same each time.
func randomSteps(n int) []byte {
	steps := make([]byte, n)
	random := rand.New(rand.NewPCG(1, 2))
	for i := range steps {
		steps[i] = byte(random.Uint32())
	}
	return steps
}

// Whatever is taken and freed, regions never overlap, and what is freed can be taken again whole.
func FuzzRegions(f *testing.F) {
	f.Add([]byte{0, 1, 2, 3, 128, 129, 7, 255, 4, 4, 4, 130})
	f.Add(randomSteps(2000))

	f.Fuzz(func(t *testing.T, steps []byte) {
		const capacity = 256
		r := newRegions(capacity)
		var taken []region
		owned := [capacity]bool{}
		mark := func(g region, own bool) {
			for i := g.base; i < g.base+1<<g.order; i++ {
				if owned[i] == own {
					t.Fatalf("entry %d of %+v: taken is already %v", i, g, own)
				}
				owned[i] = own
			}
		}
		for _, step := range steps {
			if free := step >= 128; free && len(taken) > 0 {
				i := int(step) % len(taken)
				mark(taken[i], false)
				r.free(taken[i])
				taken = append(taken[:i], taken[i+1:]...)
				continue
			}
			order := int(step) % 6
			if base, ok := r.take(order); ok {
				taken = append(taken, region{base, order})
				mark(taken[len(taken)-1], true)
			}
		}

		// The same regions can be reserved in a new allocator, once.
		again := newRegions(capacity)
		for _, g := range taken {
			if !again.reserve(g) {
				t.Fatalf("cannot reserve %+v", g)
			}
			if again.reserve(g) {
				t.Fatalf("%+v was reserved twice", g)
			}
		}
		if again.taken() != r.taken() {
			t.Fatalf("taken: %d, by reserve %d", r.taken(), again.taken())
		}
		for _, g := range taken {
			r.free(g)
			again.free(g)
		}
		for _, empty := range []*regions{r, again} {
			if base, ok := empty.take(8); !ok || base != 0 || empty.taken() != capacity {
				t.Fatalf("all is free, but not in one piece: %d, %v", base, ok)
			}
		}
	})
}

func TestReserveOutside(t *testing.T) {
	r := newRegions(16)
	for _, g := range []region{{16, 0}, {8, 4}, {2, 2}, {0, 5}} {
		if r.reserve(g) {
			t.Errorf("%+v is no region of 16 entries, but was reserved", g)
		}
	}
}
