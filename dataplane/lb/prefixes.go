// SPDX-License-Identifier: Apache-2.0

package lb

import (
	"errors"
	"fmt"
	"iter"
	"net/netip"
	"slices"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"
)

// maxPrefixes is how many prefixes of addresses a map of them holds.
const maxPrefixes = 1 << 10

// A prefixKey is a prefix in a map of them: struct prefix in packet.bpf.c. Prefixes of IPv4 are mapped into IPv6.
type prefixKey struct {
	Length  uint32
	Address [16]byte
}

func prefixKeyOf(p netip.Prefix) prefixKey {
	length := p.Bits()
	if p.Addr().Is4() {
		length += 96
	}
	return prefixKey{uint32(length), p.Masked().Addr().As16()}
}

// prefix is what prefixKeyOf was given, without the bits of its address that do not count.
func (k prefixKey) prefix() netip.Prefix {
	address := netip.AddrFrom16(k.Address)
	if address.Is4In6() && k.Length >= 96 {
		return netip.PrefixFrom(address.Unmap(), int(k.Length)-96)
	}
	return netip.PrefixFrom(address, int(k.Length))
}

// setPrefixes makes a map hold these prefixes and no others. What is in both is in it all the time.
func setPrefixes(m *ebpf.Map, prefixes []netip.Prefix) error {
	want := make(map[prefixKey]bool)
	for _, p := range prefixes {
		if !p.IsValid() {
			return errors.New("a prefix is invalid")
		}
		key := prefixKeyOf(p)
		want[key] = true
		if err := m.Put(key, uint8(1)); err != nil {
			return explainPut(m, p, err)
		}
	}
	has, err := prefixesOf(m)
	if err != nil {
		return err
	}
	for _, p := range has {
		if want[prefixKeyOf(p)] {
			continue
		}
		if err := m.Delete(prefixKeyOf(p)); err != nil {
			return fmt.Errorf("remove a prefix from %v: %w", m, err)
		}
	}
	return nil
}

// prefixesOf lists the prefixes that a map holds.
func prefixesOf(m *ebpf.Map) ([]netip.Prefix, error) {
	var key prefixKey
	var value uint8
	var has []netip.Prefix
	all := m.Iterate()
	for all.Next(&key, &value) {
		has = append(has, key.prefix())
	}
	if err := all.Err(); err != nil {
		return nil, fmt.Errorf("read %v: %w", m, err)
	}
	return has, nil
}

func explainPut(m *ebpf.Map, p any, err error) error {
	if errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.E2BIG) {
		err = ErrFull
	}
	return fmt.Errorf("add %v to %v: %w", p, m, err)
}

// A rangeKey is a range of a frontend: struct range in packet.bpf.c.
type rangeKey struct {
	Length  uint32
	_       uint32
	Key     key
	Address [16]byte
}

// frontendBits are those of a rangeKey's length that are not of the prefix.
const frontendBits = 32 + keyWords6*64

func rangeKeyOf(f Frontend, p netip.Prefix) rangeKey {
	k := prefixKeyOf(p)
	return rangeKey{Length: frontendBits + k.Length, Key: keyOf(f), Address: k.Address}
}

// prefix is what rangeKeyOf was given, once the frontend is known.
func (r rangeKey) prefix(f Frontend) netip.Prefix {
	length, address := int(r.Length)-frontendBits, netip.AddrFrom16(r.Address)
	if f.Address.Addr().Is4() {
		length, address = length-96, address.Unmap()
	}
	return netip.PrefixFrom(address, length)
}

func (r rangeKey) item() (Frontend, netip.Prefix) {
	f := r.Key.frontend()
	return f, r.prefix(f)
}

// A lingerKey is a backend that lingers at a frontend: struct linger in flows.h.
type lingerKey struct {
	Key, Backend key
}

func lingerKeyOf(f Frontend, backend netip.AddrPort) lingerKey {
	return lingerKey{keyOf(f), backendKeyOf(backend)}
}

func (l lingerKey) item() (Frontend, netip.AddrPort) {
	f := l.Key.frontend()
	words := l.Backend[:]
	if f.Address.Addr().Is4() {
		words = words[:slotWords4]
	}
	return f, backendOf(words)
}

// An annex is what programs know of frontends besides their entries, in a map of its own whose keys are a frontend and one thing each.
type annex[T comparable, K interface{ item() (Frontend, T) }] struct {
	programs *ebpf.Map
	keyOf    func(Frontend, T) K
	of       map[Frontend][]T
}

func newAnnex[T comparable, K interface{ item() (Frontend, T) }](keyOf func(Frontend, T) K) *annex[T, K] {
	return &annex[T, K]{keyOf: keyOf, of: make(map[Frontend][]T)}
}

// takeOver learns what the map holds.
func (a *annex[T, K]) takeOver() error {
	var k K
	var value uint8
	all := a.programs.Iterate()
	for all.Next(&k, &value) {
		f, item := k.item()
		a.of[f] = append(a.of[f], item)
	}
	if err := all.Err(); err != nil {
		return fmt.Errorf("read %v: %w", a.programs, err)
	}
	return nil
}

// add has the programs know these, too, up to the first that finds no room.
func (a *annex[T, K]) add(f Frontend, items []T) error {
	known := setOf(a.of[f])
	for _, item := range items {
		if known[item] {
			continue
		}
		if err := a.programs.Put(a.keyOf(f, item), uint8(1)); err != nil {
			return explainPut(a.programs, item, err)
		}
		a.of[f], known[item] = append(a.of[f], item), true
	}
	return nil
}

// keep has the programs know none but these.
func (a *annex[T, K]) keep(f Frontend, items []T) error {
	var errs []error
	wanted := setOf(items)
	left := slices.DeleteFunc(a.of[f], func(item T) bool {
		if wanted[item] {
			return false
		}
		err := a.programs.Delete(a.keyOf(f, item))
		if err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			errs = append(errs, fmt.Errorf("remove %v from %v: %w", item, a.programs, err))
			return false
		}
		return true
	})
	if len(left) > 0 {
		a.of[f] = left
	} else {
		delete(a.of, f)
	}
	return errors.Join(errs...)
}

func setOf[T comparable](items []T) map[T]bool {
	set := make(map[T]bool, len(items))
	for _, item := range items {
		set[item] = true
	}
	return set
}

// addresses are those of the frontends of scope Rest. Their map is not the services map, whose look-ups would be slower for them.
type addresses struct {
	programs *ebpf.Map
	are      map[netip.Addr]bool
}

func newAddresses() *addresses { return &addresses{are: make(map[netip.Addr]bool)} }

// takeOver learns what the map holds.
func (a *addresses) takeOver() error {
	var k [16]byte
	var value uint8
	all := a.programs.Iterate()
	for all.Next(&k, &value) {
		a.are[netip.AddrFrom16(k).Unmap()] = true
	}
	if err := all.Err(); err != nil {
		return fmt.Errorf("read %v: %w", a.programs, err)
	}
	return nil
}

// set has an address be one of them, or not.
func (a *addresses) set(address netip.Addr, is bool) error {
	switch {
	case is == a.are[address]:
		return nil
	case is:
		if err := a.programs.Put(address.As16(), uint8(1)); err != nil {
			return explainPut(a.programs, address, err)
		}
		a.are[address] = true
	default:
		if err := a.programs.Delete(address.As16()); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			return fmt.Errorf("remove %v from %v: %w", address, a.programs, err)
		}
		delete(a.are, address)
	}
	return nil
}

// all lists the frontends.
func (a *addresses) all() iter.Seq[Frontend] {
	return func(yield func(Frontend) bool) {
		for address := range a.are {
			if !yield(Frontend{Address: netip.AddrPortFrom(address, 0), Scope: Rest}) {
				return
			}
		}
	}
}
