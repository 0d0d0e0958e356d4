// SPDX-License-Identifier: Apache-2.0

package lb

import (
	"iter"
	"math/bits"
	"time"
)

// A region is 1<<order neighbouring entries of the backends map, from base, a multiple of its size.
type region struct {
	base  int
	order int
}

// orderFor is the order of the smallest region that n > 0 backends fit in.
func orderFor(n int) int { return bits.Len(uint(n - 1)) }

func regionFor(base, n int) region { return region{base, orderFor(n)} }

func roundUpPowerOfTwo(n int) int { return 1 << orderFor(max(n, 1)) }

// regions tells which entries of the backends map are taken. It is a buddy allocator: a region is halved until it fits,
// and freed halves unite again, so that no sequence of sizes wears the map out. It takes the lowest region that fits.
type regions struct {
	capacity int
	used     int
	levels   []level // by order
}

// A level holds the free regions of one order, one bit each.
type level struct {
	free  []uint64
	count int // bits set in free
	hint  int // no word of free before this one has a bit set
}

// newRegions expects a power of two.
func newRegions(capacity int) *regions {
	top := orderFor(capacity)
	r := &regions{capacity: capacity, levels: make([]level, top+1)}
	for order := range r.levels {
		r.levels[order].free = make([]uint64, (capacity>>order+63)/64)
	}
	r.levels[top].set(0)
	return r
}

// taken is how many entries are in regions that were taken and not freed.
func (r *regions) taken() int { return r.used }

// take gives the base of a free region, or false if there is none so large.
func (r *regions) take(order int) (base int, ok bool) {
	from := order
	for from < len(r.levels) && r.levels[from].count == 0 {
		from++
	}
	if from >= len(r.levels) {
		return 0, false
	}
	index := r.levels[from].lowest()
	r.levels[from].clear(index)
	for ; from > order; from-- {
		index *= 2
		r.levels[from-1].set(index + 1)
	}
	r.used += 1 << order
	return index << order, true
}

// reserve takes a certain region, or returns false if a part of it is taken or outside.
func (r *regions) reserve(want region) bool {
	if want.order >= len(r.levels) || want.base+1<<want.order > r.capacity || want.base&(1<<want.order-1) != 0 {
		return false
	}
	from := want.order
	for from < len(r.levels) && !r.levels[from].has(want.base>>from) {
		from++
	}
	if from == len(r.levels) {
		return false
	}
	r.levels[from].clear(want.base >> from)
	for ; from > want.order; from-- {
		r.levels[from-1].set(want.base>>(from-1) ^ 1)
	}
	r.used += 1 << want.order
	return true
}

// free gives a region back that was taken.
func (r *regions) free(g region) {
	r.used -= 1 << g.order
	index, order := g.base>>g.order, g.order
	for order < len(r.levels)-1 && r.levels[order].has(index^1) {
		r.levels[order].clear(index ^ 1)
		index, order = index/2, order+1
	}
	r.levels[order].set(index)
}

func (l *level) has(i int) bool { return l.free[i/64]&(1<<(i%64)) != 0 }

func (l *level) set(i int) {
	l.free[i/64] |= 1 << (i % 64)
	l.count++
	l.hint = min(l.hint, i/64)
}

func (l *level) clear(i int) {
	l.free[i/64] &^= 1 << (i % 64)
	l.count--
}

// lowest expects that a bit is set.
func (l *level) lowest() int {
	for l.free[l.hint] == 0 {
		l.hint++
	}
	return l.hint*64 + bits.TrailingZeros64(l.free[l.hint])
}

// retiredRegions are regions that no word leads to any more, but a connect that read the word before may.
type retiredRegions struct {
	queue []retiredRegion // by end
	slots int             // entries in all of them
}

type retiredRegion struct {
	region
	end time.Time
}

func (q *retiredRegions) add(r region, end time.Time) {
	q.queue = append(q.queue, retiredRegion{r, end})
	q.slots += 1 << r.order
}

// due removes and lists the regions whose time has come.
func (q *retiredRegions) due(now time.Time) iter.Seq[region] {
	return func(yield func(region) bool) {
		for len(q.queue) > 0 && !q.queue[0].end.After(now) {
			r := q.queue[0].region
			q.queue = q.queue[1:]
			q.slots -= 1 << r.order
			if !yield(r) {
				return
			}
		}
		if len(q.queue) == 0 {
			q.queue = nil
		}
	}
}
