// SPDX-License-Identifier: Apache-2.0

package lb

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"sync/atomic"
	"time"
	"unsafe"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"
)

// A family is the frontends of IPv4 or of IPv6, in maps of their own.
type family struct {
	options   Options
	slotWords int      // words of a slot
	memory    []byte   // the backends map, shared with the programs
	slots     []uint64 // the same, as words
	table     *table   // the services map
	regions   *regions // which of the slots are taken
	retired   retiredRegions
	backends  int // of all frontends together
	// sctp are the backends that natTable knows by their slots: of frontends over SCTP, and of former ones whose slots nobody has taken.
	sctp map[int]netip.AddrPort
	// place is called with backends of a frontend over SCTP before they are published.
	place func(base int, backends []netip.AddrPort) error
}

// newFamily shares the memory of the maps with this process: writing a word is then one store that a reader sees whole or
// not at all, and takes no system call. protection is PROT_READ, or with PROT_WRITE for a family that changes.
func newFamily(options Options, keyWords, slotWords int, services, backends *ebpf.Map, protection int) (*family, error) {
	memory, err := shareMap(services, protection)
	if err != nil {
		return nil, err
	}
	f := &family{options: options, slotWords: slotWords, table: newTable(memory, keyWords), sctp: make(map[int]netip.AddrPort)}
	if f.memory, err = shareMap(backends, protection); err != nil {
		return nil, errors.Join(err, f.close())
	}
	f.slots = unsafe.Slice((*uint64)(unsafe.Pointer(unsafe.SliceData(f.memory))), options.Backends*slotWords)
	f.regions = newRegions(options.Backends)
	f.regions.reserve(unused)
	return f, nil
}

// shareMap gives the memory of an array map, which begins with a page and whose elements follow each other.
func shareMap(m *ebpf.Map, protection int) ([]byte, error) {
	page := os.Getpagesize()
	size := (int(m.MaxEntries())*int(m.ValueSize()) + page - 1) / page * page
	memory, err := unix.Mmap(m.FD(), 0, size, protection, unix.MAP_SHARED)
	if err != nil {
		return nil, fmt.Errorf("share the memory of %v: %w", m, err)
	}
	return memory, nil
}

func (f *family) close() error {
	err := f.table.close()
	if f.memory != nil {
		err = errors.Join(err, unix.Munmap(f.memory))
		f.memory, f.slots = nil, nil
	}
	return err
}

// takeOver makes this process's picture of the maps from what they hold.
func (f *family) takeOver() error {
	for k, e := range f.table.all() {
		w := f.table.word(e)
		if f.table.find(k) != e || w.owner() != f.table.owner(k) {
			return fmt.Errorf("frontend %v is not where it belongs", k.frontend())
		}
		if w.count() > 0 && !f.claim(w) {
			return fmt.Errorf("frontend %v claims backends %d to %d, which are not its own", k.frontend(), w.base(), w.base()+w.count()-1)
		}
		f.table.count(k, 1)
		f.backends += w.count()
		if k.frontend().Protocol == SCTP {
			set := f.set(e, w)
			for i := range w.count() {
				f.sctp[w.base()+i] = backendOf(set[i*f.slotWords : (i+1)*f.slotWords])
			}
		}
	}
	return nil
}

// claim takes the backends that a word leads to, or returns false if it cannot.
func (f *family) claim(w word) bool {
	if !w.inline() {
		return f.regions.reserve(w.region())
	}
	return w.count() <= f.maxInline() && (w.base() == firstInline || w.base() == otherInline)
}

// maxInline is how many backends an entry has room for.
func (f *family) maxInline() int {
	if f.table.keyWords == keyWords4 {
		return maxInline
	}
	return 0
}

func (f *family) withdraw(c Change, now time.Time) {
	k := keyOf(c.Frontend)
	e := f.table.find(k)
	if e == nil {
		return
	}
	f.table.remove(e, k)
	f.retire(f.table.word(e), now)
}

func (f *family) publish(c Change, now time.Time) error {
	k := keyOf(c.Frontend)
	owner := f.table.owner(k)
	e := f.table.find(k)
	published := e != nil
	var old word
	if published {
		if old = f.table.word(e); f.holds(e, owner, c) {
			return nil
		}
	} else if f.table.used < f.options.Services {
		e = f.table.place(k)
	}
	if e == nil {
		return fmt.Errorf("services: %d of %d places are taken, and none is left for this one: %w", f.table.used, f.options.Services, ErrFull)
	}

	// The new backends are written where no reader looks, and then the word that leads to them, at once.
	inline := f.maxInline()
	if c.Affinity.Timeout > 0 || c.Frontend.Protocol == SCTP {
		inline = 0
	}
	base, err := f.room(old, len(c.Backends), inline)
	if err != nil {
		return err
	}
	if c.Frontend.Protocol == SCTP {
		if err := f.place(base, c.Backends); err != nil {
			if len(c.Backends) > 0 {
				f.regions.free(regionFor(base, len(c.Backends)))
			}
			return err
		}
	}
	w := makeWord(base, len(c.Backends), owner) | c.flags()
	set := f.set(e, w)
	for i, backend := range c.Backends {
		f.store(set[i*f.slotWords:], f.table.slotOf(backend, owner))
	}
	if w.inline() && w.count() > 0 {
		// Who read the word of a larger set that was here before must not find one of its backends.
		for i := base + w.count(); i < base+maxInline; i++ {
			atomic.StoreUint64(&e[i], 0)
		}
	}
	if c.Affinity.Timeout > 0 && w.count() > 0 {
		if published && old.inline() {
			// Subtle: these words may be backends of the old set, which must not vanish while connects are led there.
			f.table.publish(e, w)
		}
		atomic.StoreUint64(&e[affinityID], c.Affinity.ID<<16)
		atomic.StoreUint64(&e[affinityTimeout], uint64(c.Affinity.Timeout)<<16)
		w |= affine
	}
	f.table.publish(e, w)
	f.backends += w.count()
	if published {
		f.retire(old, now)
	} else {
		f.table.insert(e, k)
	}
	return nil
}

// store writes a backend, the word that tells its owner last.
func (f *family) store(where []uint64, s slot) {
	for i := f.slotWords - 1; i >= 0; i-- {
		atomic.StoreUint64(&where[i], s[i])
	}
}

// room gives the base of a place for n backends of a frontend whose word is old, if it has one, and whose entry has room for so many.
func (f *family) room(old word, n, inline int) (base int, err error) {
	switch {
	case n == 0:
		return 0, nil
	case n > inline:
		base, ok := f.regions.take(orderFor(n))
		if !ok {
			return 0, fmt.Errorf("backends: no room for %d more (of %d, %d are taken, %d of those free after the grace period): %w",
				n, f.options.Backends, f.regions.taken(), f.retired.slots, ErrFull)
		}
		return base, nil
	case old.base() == firstInline:
		return otherInline, nil
	}
	return firstInline, nil
}

// set is where the backends are that the word of an entry leads to.
func (f *family) set(e *entry, w word) []uint64 {
	if w.inline() {
		return e[w.base() : w.base()+w.count()]
	}
	return f.slots[w.base()*f.slotWords : (w.base()+w.count())*f.slotWords]
}

// holds tells whether an entry leads to the backends of a change, in this order, with its affinity.
func (f *family) holds(e *entry, owner uint64, c Change) bool {
	w := f.table.word(e)
	if w.count() != len(c.Backends) || w&flags&^affine != c.flags() || w.count() > 0 && f.affinity(e, w) != c.Affinity {
		return false
	}
	set := f.set(e, w)
	for i, backend := range c.Backends {
		s := f.table.slotOf(backend, owner)
		for j, held := range set[i*f.slotWords : (i+1)*f.slotWords] {
			if held != s[j] {
				return false
			}
		}
	}
	return true
}

// affinity is that of an entry with this word.
func (f *family) affinity(e *entry, w word) Affinity {
	if w&affine == 0 {
		return Affinity{}
	}
	return Affinity{ID: e[affinityID] >> 16, Timeout: time.Duration(e[affinityTimeout] >> 16)}
}

// retire sets the region of a word that is no longer published aside until its readers have left. Backends in an entry
// need no such time: whoever reads them late finds what is newer, or nothing, and looks again.
func (f *family) retire(w word, now time.Time) {
	f.backends -= w.count()
	if !w.inline() {
		f.retired.add(w.region(), now.Add(f.options.Grace))
	}
}

// reclaim frees the regions whose grace period is over.
func (f *family) reclaim(now time.Time) {
	for r := range f.retired.due(now) {
		f.regions.free(r)
	}
}

// counts tells how full the maps are.
func (f *family) counts() Counts {
	return Counts{
		Frontends:        f.table.inside,
		Entries:          f.table.used,
		Backends:         f.backends,
		Slots:            f.regions.taken() - entryWords,
		ServicesCapacity: f.options.Services,
		BackendsCapacity: f.options.Backends - entryWords,
	}
}
