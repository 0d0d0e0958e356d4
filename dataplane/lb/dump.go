// SPDX-License-Identifier: Apache-2.0

package lb

import (
	"cmp"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"sync/atomic"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"
)

// Dump lists what the maps pinned under a PinDir hold now, sorted by frontend: the changes by which an empty Balancer would hold the
// same. A Balancer may be writing them meanwhile; each frontend is then as it was at one moment, but for an affinity
// or ranges that are changing, too, which may be those of before or after.
func Dump(pinDir string) (_ []Change, err error) {
	dir := filepath.Join(pinDir, layout)
	var all []Change
	for _, v := range []struct {
		keyWords, slotWords int
		services, backends  string
	}{
		{keyWords4, slotWords4, socketMapServices4, socketMapBackends4},
		{keyWords6, slotWords6, socketMapServices6, socketMapBackends6},
	} {
		changes, err := dump(filepath.Join(dir, v.services), filepath.Join(dir, v.backends), v.keyWords, v.slotWords)
		if errors.Is(err, os.ErrNotExist) {
			return nil, fmt.Errorf("no maps in %s: %w", dir, err)
		}
		if err != nil {
			return nil, fmt.Errorf("maps in %s: %w", dir, err)
		}
		all = append(all, changes...)
	}
	rest, err := dumpAddresses(filepath.Join(dir, packetMapAddresses))
	if err != nil {
		return nil, fmt.Errorf("maps in %s: %w", dir, err)
	}
	all = append(all, rest...)
	ranges, lingering := newAnnex(rangeKeyOf), newAnnex(lingerKeyOf)
	if err := errors.Join(ranges.open(filepath.Join(dir, socketMapRanges)), lingering.open(filepath.Join(dir, socketMapLingering))); err != nil {
		return nil, fmt.Errorf("maps in %s: %w", dir, err)
	}
	for i, c := range all {
		if c.Ranges != nil {
			all[i].Ranges = append(c.Ranges, ranges.of[c.Frontend]...)
		}
		all[i].Lingering = lingering.of[c.Frontend]
	}
	slices.SortFunc(all, func(a, b Change) int {
		return cmp.Or(a.Frontend.Address.Compare(b.Frontend.Address), cmp.Compare(a.Frontend.Protocol, b.Frontend.Protocol), cmp.Compare(a.Frontend.Scope, b.Frontend.Scope))
	})
	return all, nil
}

// dumpAddresses lists the frontends of a pinned map of addresses.
func dumpAddresses(path string) (all []Change, err error) {
	m, err := ebpf.LoadPinnedMap(path, &ebpf.LoadPinOptions{ReadOnly: true})
	if err != nil {
		return nil, err
	}
	defer m.Close()
	a := newAddresses()
	a.programs = m
	if err := a.takeOver(); err != nil {
		return nil, err
	}
	for f := range a.all() {
		all = append(all, Change{Frontend: f})
	}
	return all, nil
}

// open learns what a pinned map holds. It may be changing: what is on its way is there or not.
func (a *annex[T, K]) open(path string) (err error) {
	if a.programs, err = ebpf.LoadPinnedMap(path, &ebpf.LoadPinOptions{ReadOnly: true}); err != nil {
		return err
	}
	defer a.programs.Close()
	return a.takeOver()
}

// dump lists what two pinned maps hold.
func dump(services, backends string, keyWords, slotWords int) (all []Change, err error) {
	// Note: opening them for reading alone was tried. The kernel shares no memory of a map that was opened so.
	s, err := ebpf.LoadPinnedMap(services, nil)
	if err != nil {
		return nil, err
	}
	defer s.Close()
	b, err := ebpf.LoadPinnedMap(backends, nil)
	if err != nil {
		return nil, err
	}
	defer b.Close()
	f, err := newFamily(Options{Backends: int(b.MaxEntries())}, keyWords, slotWords, s, b, unix.PROT_READ)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, f.close()) }()
	return f.dump()
}

// dump lists what is published.
func (f *family) dump() (all []Change, err error) {
	for k, e := range f.table.all() {
		change, ok := f.read(k, e)
		if !ok {
			return nil, fmt.Errorf("frontend %v changes without a pause", k.frontend())
		}
		// One that was withdrawn meanwhile is none.
		if f.table.keyOf(e) == k {
			all = append(all, change)
		}
	}
	return all, nil
}

// readLimit is how often a frontend that is being changed is read. A change is some ten stores.
const readLimit = 1000

// read gives what a frontend was at one moment, though another process may be changing them.
//
// Subtle: the word alone does not tell that all are of one set, as it does not have to for the programs, which look at one backend: after
// two changes it may be the same again. So what was read must be read twice.
func (f *family) read(k key, e *entry) (Change, bool) {
	var before []uint64
	for range readLimit {
		w := word(atomic.LoadUint64(&e[f.table.keyWords]))
		if f.table.keyOf(e) != k {
			return Change{}, true // withdrawn
		}
		if w.owner() != f.table.owner(k) {
			continue
		}
		affinity := f.affinity(e, w)
		words := []uint64{uint64(w), affinity.ID, uint64(affinity.Timeout)}
		set := f.set(e, w)
		for i := range set {
			words = append(words, atomic.LoadUint64(&set[i]))
		}
		if slices.Equal(words, before) {
			c := Change{Frontend: k.frontend(), Affinity: affinity, Drop: w&drop != 0, Masquerade: w&masquerade != 0}
			for s := range slices.Chunk(words[3:], f.slotWords) {
				c.Backends = append(c.Backends, backendOf(s))
			}
			if w&ranged != 0 {
				c.Ranges = []netip.Prefix{} // which ones stands elsewhere
			}
			return c, true
		}
		before = words
	}
	return Change{}, false
}
