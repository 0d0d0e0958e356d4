// SPDX-License-Identifier: Apache-2.0

package lb

import (
	"errors"
	"fmt"
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
	var key prefixKey
	var value uint8
	var gone []prefixKey
	all := m.Iterate()
	for all.Next(&key, &value) {
		if !want[key] {
			gone = append(gone, key)
		}
	}
	if err := all.Err(); err != nil {
		return fmt.Errorf("read %v: %w", m, err)
	}
	for _, key := range gone {
		if err := m.Delete(key); err != nil {
			return fmt.Errorf("remove a prefix from %v: %w", m, err)
		}
	}
	return nil
}

func explainPut(m *ebpf.Map, p netip.Prefix, err error) error {
	if errors.Is(err, unix.ENOSPC) {
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

// ranges are where the clients of frontends are admitted from.
type ranges struct {
	programs *ebpf.Map
	of       map[Frontend][]netip.Prefix
}

func newRanges() *ranges { return &ranges{of: make(map[Frontend][]netip.Prefix)} }

// takeOver learns what the map holds.
func (r *ranges) takeOver() error {
	var key rangeKey
	var value uint8
	all := r.programs.Iterate()
	for all.Next(&key, &value) {
		f := key.Key.frontend()
		r.of[f] = append(r.of[f], key.prefix(f))
	}
	if err := all.Err(); err != nil {
		return fmt.Errorf("read %v: %w", r.programs, err)
	}
	return nil
}

// add admits clients of these, too.
func (r *ranges) add(f Frontend, prefixes []netip.Prefix) error {
	for _, p := range prefixes {
		p = p.Masked()
		if slices.Contains(r.of[f], p) {
			continue
		}
		if err := r.programs.Put(rangeKeyOf(f, p), uint8(1)); err != nil {
			return explainPut(r.programs, p, err)
		}
		r.of[f] = append(r.of[f], p)
	}
	return nil
}

// keep admits clients of these alone.
func (r *ranges) keep(f Frontend, prefixes []netip.Prefix) error {
	var errs []error
	left := slices.DeleteFunc(r.of[f], func(p netip.Prefix) bool {
		if slices.ContainsFunc(prefixes, func(other netip.Prefix) bool { return other.Masked() == p }) {
			return false
		}
		err := r.programs.Delete(rangeKeyOf(f, p))
		if err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			errs = append(errs, fmt.Errorf("remove %v from %v: %w", p, r.programs, err))
			return false
		}
		return true
	})
	if len(left) > 0 {
		r.of[f] = left
	} else {
		delete(r.of, f)
	}
	return errors.Join(errs...)
}
