// SPDX-License-Identifier: Apache-2.0

package lb

import (
	"errors"
	"fmt"
	"iter"
	"net/netip"
	"sync/atomic"
	"time"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"
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
		for k := range b.words {
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
	old, published := b.words[k]
	if !published {
		return nil
	}
	if err := b.objects.Services.Delete(&k); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
		return fmt.Errorf("delete from the services map: %w", err)
	}
	delete(b.words, k)
	b.retire(old, now)
	return nil
}

func (b *Balancer) publish(c Change, now time.Time) error {
	if err := c.check(); err != nil {
		return err
	}
	k := keyOf(c.Frontend)
	old, published := b.words[k]
	if published && b.holds(old, k.owner(), c.Backends) {
		return nil
	}

	// The new backends are written where no reader looks, and then the word that leads to them, at once.
	base := 0
	if len(c.Backends) > 0 {
		var ok bool
		if base, ok = b.regions.take(orderFor(len(c.Backends))); !ok {
			return fmt.Errorf("backends: no room for %d more (of %d, %d are taken, %d of those free after the grace period): %w",
				len(c.Backends), b.options.Backends, b.regions.taken(), b.retired.slots, ErrFull)
		}
	}
	for i, backend := range c.Backends {
		b.store(base+i, entryOf(backend, k.owner()))
	}
	w := makeWord(base, len(c.Backends), k.owner())
	if err := b.objects.Services.Update(&k, &w, ebpf.UpdateAny); err != nil {
		if w.count() > 0 {
			b.regions.free(w.region()) // no reader has seen it
		}
		if errors.Is(err, unix.E2BIG) {
			return fmt.Errorf("services: all %d entries are taken: %w", b.options.Services, ErrFull)
		}
		return fmt.Errorf("update the services map: %w", err)
	}
	b.words[k] = w
	b.backends += w.count()
	if published {
		b.retire(old, now)
	}
	return nil
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

// holds tells whether a word leads to these backends, in this order.
func (b *Balancer) holds(w word, owner uint64, backends []netip.AddrPort) bool {
	if w.count() != len(backends) {
		return false
	}
	for i, backend := range backends {
		if atomic.LoadUint64(&b.slots[w.base()+i]) != entryOf(backend, owner) {
			return false
		}
	}
	return true
}

// retire sets the region of a word that is no longer published aside until its readers have left.
func (b *Balancer) retire(w word, now time.Time) {
	b.backends -= w.count()
	if w.count() > 0 {
		b.retired.add(w.region(), now.Add(b.options.Grace))
	}
}

// reclaim frees the regions whose grace period is over.
func (b *Balancer) reclaim(now time.Time) {
	for r := range b.retired.due(now) {
		b.regions.free(r)
	}
}
