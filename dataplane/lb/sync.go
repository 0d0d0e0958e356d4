// SPDX-License-Identifier: Apache-2.0

package lb

import (
	"errors"
	"fmt"
	"iter"
	"net/netip"
	"slices"
	"time"
)

// A Change is what one frontend shall be from now on.
type Change struct {
	Frontend Frontend
	// Withdraw removes the frontend: connects to it are no longer translated.
	Withdraw bool
	// Backends are what connects go to, each with the same probability; at most 65,535, of the frontend's IP version.
	// None means that connects are refused with ECONNREFUSED, and packets by an RST or as ICMP does it.
	Backends []netip.AddrPort
	// Affinity has clients keep their backend; zero lets each connect go to any.
	Affinity Affinity
	// Drop has packets dropped where there are no backends; connects are then not translated.
	Drop bool
	// Masquerade has backends see an address of the node where packets are translated. At the socket no address is known yet.
	Masquerade bool
	// Ranges are where clients are admitted from; others have their packets dropped, and their connects are not translated. None admits
	// all. Connects of clients whose addresses are not set (SetSources) are left to packets.
	Ranges []netip.Prefix
	// Lingering are backends that no new flow goes to, but those over UDP that go there may stay, at the socket. Elsewhere conntrack decides.
	Lingering []netip.AddrPort
}

// flags are those that the word of a change has, but for that of affinity.
func (c Change) flags() (w word) {
	if c.Drop {
		w |= drop
	}
	if c.Masquerade {
		w |= masquerade
	}
	if len(c.Ranges) > 0 {
		w |= ranged
	}
	return w
}

// An Affinity has a client go to the backend that it went to last, while that is one of the frontend's and its last connect is no
// longer ago than Timeout. A client is an address, or at the socket a network namespace while its address is not set (SetSources).
type Affinity struct {
	// ID is what frontends have in common, of one IP version, that are the same to a client. 48 bits count.
	ID uint64
	// Timeout is at most 78 hours; zero is no affinity.
	Timeout time.Duration
}

// maxAffinity is what 48 bits can say, of the ID or of nanoseconds.
const maxAffinity = 1<<48 - 1

// A FrontendError says why a Change was not made. The frontend is as it was before, unless it is ranges or what lingers that found no room: then
// the rest of the change is made, and the frontend admits fewer clients than it should, never more.
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
	for _, f := range b.families() {
		f.reclaim(now)
	}

	var errs []error
	for _, withdraw := range []bool{true, false} {
		for _, c := range changes {
			if c.Withdraw != withdraw {
				continue
			}
			if err := b.change(c, now); err != nil {
				errs = append(errs, &FrontendError{c.Frontend, err})
			}
		}
	}
	return errors.Join(append(errs, b.chainFrontends(changes)...)...)
}

func (b *Balancer) change(c Change, now time.Time) error {
	if err := c.check(); err != nil {
		return err
	}
	// A mapped address is the same frontend.
	c.Frontend.Address = netip.AddrPortFrom(c.Frontend.Address.Addr().Unmap(), c.Frontend.Address.Port())
	if c.Frontend.Scope == Rest {
		return b.addresses.set(c.Frontend.Address.Addr(), !c.Withdraw)
	}
	f := b.familyOf(c.Frontend)
	if c.Withdraw {
		f.withdraw(c, now)
		return errors.Join(b.ranges.keep(c.Frontend, nil), b.lingering.keep(c.Frontend, nil))
	}
	c.Ranges, c.Lingering = slices.Clone(c.Ranges), slices.Clone(c.Lingering)
	for i, r := range c.Ranges {
		c.Ranges[i] = r.Masked()
	}
	for i, l := range c.Lingering {
		c.Lingering[i] = netip.AddrPortFrom(l.Addr().Unmap(), l.Port())
	}
	// Who is admitted, and what lingers, is known before the frontend is, and forgotten after.
	ranges, lingering := slices.Clone(b.ranges.of[c.Frontend]), slices.Clone(b.lingering.of[c.Frontend])
	noRoom := errors.Join(b.ranges.add(c.Frontend, c.Ranges), b.lingering.add(c.Frontend, c.Lingering))
	if err := f.publish(c, now); err != nil {
		return errors.Join(noRoom, err, b.ranges.keep(c.Frontend, ranges), b.lingering.keep(c.Frontend, lingering))
	}
	return errors.Join(noRoom, b.ranges.keep(c.Frontend, c.Ranges), b.lingering.keep(c.Frontend, c.Lingering))
}

// Frontends lists what is published, in no order. Sync must not be called meanwhile.
func (b *Balancer) Frontends() iter.Seq[Frontend] {
	return func(yield func(Frontend) bool) {
		b.mu.Lock()
		defer b.mu.Unlock()
		for _, f := range b.families() {
			if f.table.used == 0 {
				continue
			}
			for k := range f.table.all() {
				if !yield(k.frontend()) {
					return
				}
			}
		}
		b.addresses.all()(yield)
	}
}

// Changes lists the changes by which an empty Balancer would hold what this one does, in no order, without frontends that admit nobody.
func (b *Balancer) Changes() ([]Change, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	var all []Change
	for _, f := range b.families() {
		if f.table.used == 0 {
			continue
		}
		changes, err := f.dump()
		if err != nil {
			return nil, err
		}
		all = append(all, changes...)
	}
	for f := range b.addresses.all() {
		all = append(all, Change{Frontend: f})
	}
	// Ranges that found no room admit nobody, where a Change without any would admit all.
	all = slices.DeleteFunc(all, func(c Change) bool { return c.Ranges != nil && len(b.ranges.of[c.Frontend]) == 0 })
	for i := range all {
		all[i].Ranges = slices.Clone(b.ranges.of[all[i].Frontend])
		all[i].Lingering = slices.Clone(b.lingering.of[all[i].Frontend])
	}
	return all, nil
}

func (b *Balancer) familyOf(f Frontend) *family {
	if f.Address.Addr().Unmap().Is4() {
		return b.ipv4
	}
	return b.ipv6
}

func (c Change) check() error {
	if err := c.Frontend.check(); err != nil {
		return err
	}
	if len(c.Backends)+len(c.Ranges)+len(c.Lingering) > 0 && c.Frontend.Scope == Rest {
		return errors.New("what is besides the ports has neither backends nor clients of its own")
	}
	for _, r := range c.Ranges {
		if !r.IsValid() || r.Addr().Is4() != c.Frontend.Address.Addr().Unmap().Is4() {
			return fmt.Errorf("range %v is of another IP version, or none", r)
		}
	}
	if len(c.Backends) > maxCount {
		return fmt.Errorf("%d backends: want at most %d", len(c.Backends), maxCount)
	}
	if c.Affinity.ID > maxAffinity || c.Affinity.Timeout < 0 || c.Affinity.Timeout > maxAffinity {
		return fmt.Errorf("affinity %+v: want an ID of 48 bits and a timeout of at most %v", c.Affinity, time.Duration(maxAffinity))
	}
	for _, backends := range [][]netip.AddrPort{c.Backends, c.Lingering} {
		for _, backend := range backends {
			if err := checkAddress("backend", backend); err != nil {
				return err
			}
			if backend.Addr().Unmap().Is4() != c.Frontend.Address.Addr().Unmap().Is4() {
				return fmt.Errorf("backend %v is of another IP version", backend)
			}
		}
	}
	return nil
}
