// SPDX-License-Identifier: Apache-2.0

package fleet

import (
	"encoding/binary"
	"fmt"
	"net/netip"
)

// A Plan says what each Service is. It is set once, before New.
type Plan struct {
	// Namespace holds the Services and nothing else. New makes it when it is missing.
	Namespace string
	// Endpoints of each Service, 0 to 1000; they stand in one slice.
	Endpoints int
	// Port is the Services' TCP port, TargetPort that of the endpoints.
	Port, TargetPort int32
	// EndpointPrefixes are the IPv4 ranges that the backend pods answer on, one per backend pod. Endpoint e of every Service
	// goes to pod e mod len, and every Service has addresses of its own there until the range is used up; then they begin
	// again, so that two Services share a backend address, never one Service with itself unless the range is smaller than
	// its endpoints.
	EndpointPrefixes []netip.Prefix
	// ServiceCIDR is the API server's IPv4 Service range. As the API server does, the fleet draws addresses at random and
	// keeps off the first 256, which are for addresses chosen by hand.
	ServiceCIDR netip.Prefix
	// Seed makes the Services' addresses repeat from run to run.
	Seed uint64
}

// A Service is one of the fleet, as a client of it and a check of a dataplane see it.
type Service struct {
	Name     string
	Address  netip.AddrPort
	Backends []netip.AddrPort
}

const (
	// maxEndpoints is the API's limit for one slice.
	maxEndpoints = 1000
	// staticBand is how many addresses at the beginning of a range are left alone: in the Service range those that the API
	// server keeps for fixed addresses, in a pod's range the node's and the pod's own.
	staticBand = 256
)

func (p Plan) validate() error {
	switch {
	case p.Namespace == "":
		return fmt.Errorf("fleet: no namespace")
	case p.Endpoints < 0 || p.Endpoints > maxEndpoints:
		return fmt.Errorf("fleet: %d endpoints a Service, want 0 to %d", p.Endpoints, maxEndpoints)
	case p.Endpoints > 0 && len(p.EndpointPrefixes) == 0:
		return fmt.Errorf("fleet: %d endpoints a Service and no range of addresses for them", p.Endpoints)
	case !isPort(p.Port):
		return fmt.Errorf("fleet: port %d, want 1 to 65535", p.Port)
	case !isPort(p.TargetPort):
		return fmt.Errorf("fleet: target port %d, want 1 to 65535", p.TargetPort)
	case !p.ServiceCIDR.Addr().Is4():
		return fmt.Errorf("fleet: Service range %s is not IPv4", p.ServiceCIDR)
	}
	for _, prefix := range p.EndpointPrefixes {
		if !prefix.Addr().Is4() {
			return fmt.Errorf("fleet: endpoint range %s is not IPv4", prefix)
		}
	}
	return nil
}

func isPort(n int32) bool { return n > 0 && n < 1<<16 }

// service is Service i at addr. Names are of one length and sort by age up to 99,999.
func (p Plan) service(i int, addr netip.Addr) Service {
	s := Service{
		Name:     fmt.Sprintf("svc-%05d", i),
		Address:  netip.AddrPortFrom(addr, uint16(p.Port)),
		Backends: make([]netip.AddrPort, p.Endpoints),
	}
	for e := range s.Backends {
		s.Backends[e] = netip.AddrPortFrom(p.endpointAddr(i, e), uint16(p.TargetPort))
	}
	return s
}

// endpointAddr is the address of endpoint e of Service i: in the range of pod e mod pods, number
// i*ceil(Endpoints/pods) + e/pods, counted around the range's usable addresses.
func (p Plan) endpointAddr(i, e int) netip.Addr {
	pods := len(p.EndpointPrefixes)
	each := (p.Endpoints + pods - 1) / pods
	prefix := p.EndpointPrefixes[e%pods]
	skip, room := usable(prefix)
	return nth(prefix, skip+uint64(i*each+e/pods)%room)
}

// serviceRoom is how many Services the Service range can hold.
func (p Plan) serviceRoom() uint64 {
	_, room := usable(p.ServiceCIDR)
	return room
}

// serviceAddr is address number n of serviceRoom.
func (p Plan) serviceAddr(n uint64) netip.Addr {
	skip, _ := usable(p.ServiceCIDR)
	return nth(p.ServiceCIDR, skip+n)
}

// usable says how many addresses at the beginning of an IPv4 range are left alone, a quarter of a small range, and how many
// follow that may be used. The last one, the broadcast address, is not; a single address is used as it is.
func usable(prefix netip.Prefix) (skip, room uint64) {
	size := uint64(1) << (32 - prefix.Bits())
	if size == 1 {
		return 0, 1
	}
	skip = min(staticBand, max(size/4, 1))
	return skip, max(size-skip-1, 1)
}

// nth is address n of an IPv4 range.
func nth(prefix netip.Prefix, n uint64) netip.Addr {
	base := prefix.Masked().Addr().As4()
	var b [4]byte
	binary.BigEndian.PutUint32(b[:], binary.BigEndian.Uint32(base[:])+uint32(n))
	return netip.AddrFrom4(b)
}
