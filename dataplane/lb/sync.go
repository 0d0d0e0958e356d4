// SPDX-License-Identifier: Apache-2.0

package lb

import (
	"errors"
	"fmt"
	"iter"
	"net/netip"
	"sync/atomic"
	"time"
)

// A Change is what one frontend shall be from now on.
type Change struct {
	Frontend Frontend
	// Withdraw removes the frontend: connects to it are no longer translated.
	Withdraw bool
	// Backends are what connects go to, each with the same probability; at most 65,535, over IPv4. None means that
	// connects are refused with ECONNREFUSED.
	Backends []netip.AddrPort
}

// A FrontendError says why a Change was not made. The frontend is as it was before.
type FrontendError struct {
	Frontend Frontend
	Err      error
}

func (e *FrontendError) Error() string { return fmt.Sprintf("frontend %v: %v", e.Frontend, e.Err) }
func (e *FrontendError) Unwrap() error { return e.Err }

// Sync makes the changes, withdrawals first, each atomically: a connect(2) sees a frontend before or after its change and
// nothing else. A frontend may stand in changes once. The work is proportional to the changes; those that change nothing
// write nothing.
//
// A change that cannot be made hinders no other. Sync then returns a *FrontendError for each, joined; it wraps ErrFull
// where a map has no room. Such changes can be given again.
func (b *Balancer) Sync(changes []Change) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	now := time.Now()
	b.reclaim(now)

	var errs []error
	apply := func(c Change, do func(Change, time.Time) error) {
		if err := do(c, now); err != nil {
			errs = append(errs, &FrontendError{c.Frontend, err})
		}
	}
	for _, c := range changes {
		if c.Withdraw {
			apply(c, b.withdraw)
		}
	}
	for _, c := range changes {
		if !c.Withdraw {
			apply(c, b.publish)
		}
	}
	return errors.Join(errs...)
}

// Frontends lists what is published, in no order. Sync must not be called meanwhile.
func (b *Balancer) Frontends() iter.Seq[Frontend] {
	return func(yield func(Frontend) bool) {
		b.mu.Lock()
		defer b.mu.Unlock()
		for k := range b.table.all() {
			if !yield(k.frontend()) {
				return
			}
		}
	}
}

func (b *Balancer) withdraw(c Change, now time.Time) error {
	if err := checkAddress("frontend", c.Frontend.Address); err != nil {
		return err
	}
	k := keyOf(c.Frontend)
	e := b.table.find(k)
	if e == nil {
		return nil
	}
	b.table.remove(e, k)
	b.retire(e.word(), now)
	return nil
}

func (b *Balancer) publish(c Change, now time.Time) error {
	if err := c.check(); err != nil {
		return err
	}
	k := keyOf(c.Frontend)
	owner := b.table.owner(k)
	e := b.table.find(k)
	published := e != nil
	var old word
	if published {
		if old = e.word(); b.holds(e, owner, c.Backends) {
			return nil
		}
	} else if b.table.used < b.options.Services {
		e = b.table.place(k)
	}
	if e == nil {
		return fmt.Errorf("services: %d of %d entries are taken, and none is free for this one: %w", b.table.used, b.options.Services, ErrFull)
	}

	// The new backends are written where no reader looks, and then the word that leads to them, at once.
	base, err := b.room(old, len(c.Backends))
	if err != nil {
		return err
	}
	w := makeWord(base, len(c.Backends), owner)
	set := b.set(e, w)
	for i, backend := range c.Backends {
		atomic.StoreUint64(&set[i], entryOf(backend, owner))
	}
	if w.inline() && w.count() > 0 {
		// Who read the word of a larger set that was here before must not find one of its backends.
		for i := base + w.count(); i < base+maxInline; i++ {
			atomic.StoreUint64(&e[i], 0)
		}
	}
	e.publish(w)
	b.backends += w.count()
	if published {
		b.retire(old, now)
	} else {
		b.table.insert(e, k)
	}
	return nil
}

// room gives the base of a place for n backends of a frontend whose word is old, if it has one.
func (b *Balancer) room(old word, n int) (base int, err error) {
	switch {
	case n == 0:
		return 0, nil
	case n > maxInline:
		base, ok := b.regions.take(orderFor(n))
		if !ok {
			return 0, fmt.Errorf("backends: no room for %d more (of %d, %d are taken, %d of those free after the grace period): %w",
				n, b.options.Backends, b.regions.taken(), b.retired.slots, ErrFull)
		}
		return base, nil
	case old.base() == firstInline:
		return otherInline, nil
	}
	return firstInline, nil
}

// set is where the backends are that the word of an entry leads to.
func (b *Balancer) set(e *entry, w word) []uint64 {
	if w.inline() {
		return e[w.base() : w.base()+w.count()]
	}
	return b.slots[w.base() : w.base()+w.count()]
}

func (c Change) check() error {
	if err := checkAddress("frontend", c.Frontend.Address); err != nil {
		return err
	}
	if len(c.Backends) > maxCount {
		return fmt.Errorf("%d backends: want at most %d", len(c.Backends), maxCount)
	}
	for _, backend := range c.Backends {
		if err := checkAddress("backend", backend); err != nil {
			return err
		}
	}
	return nil
}

// holds tells whether an entry leads to these backends, in this order.
func (b *Balancer) holds(e *entry, owner uint64, backends []netip.AddrPort) bool {
	set := b.set(e, e.word())
	if len(set) != len(backends) {
		return false
	}
	for i, backend := range backends {
		if set[i] != entryOf(backend, owner) {
			return false
		}
	}
	return true
}

// retire sets the region of a word that is no longer published aside until its readers have left. Backends in an entry
// need no such time: whoever reads them late finds what is newer, or nothing, and looks again.
func (b *Balancer) retire(w word, now time.Time) {
	b.backends -= w.count()
	if !w.inline() {
		b.retired.add(w.region(), now.Add(b.options.Grace))
	}
}

// reclaim frees the regions whose grace period is over.
func (b *Balancer) reclaim(now time.Time) {
	for r := range b.retired.due(now) {
		b.regions.free(r)
	}
}
