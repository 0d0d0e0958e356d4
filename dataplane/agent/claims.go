// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"cmp"
	"net"
	"slices"

	"k8s.io/klog/v2"
	"k8s.io/kubernetes/pkg/proxy"

	"github.com/plimsoll-bench/plimsoll/dataplane/lb"
)

// A claimant is a port that wants a frontend.
type claimant struct {
	name  proxy.ServicePortName
	title title
}

// A title is by what a port wants a frontend. Whoever has the better one gets it.
type title int

const (
	own          title = iota // it is at its ClusterIP, which the API server allocates
	loadBalancer              // a load balancer's address, which a controller writes
	nodePort                  // its NodePort, which the API server allocates
	byHand                    // an external address, which whoever may write the Service chooses
)

// other tells whether the frontend is for the world outside.
func (c claimant) other() bool { return c.title != own }

func (s *syncer) claimantOf(name proxy.ServicePortName, port proxy.ServicePort, frontend lb.Frontend) claimant {
	at := func(ip net.IP) bool { return isAt(frontend, ip) }
	switch ours := int(frontend.Address.Port()) == port.Port(); {
	case frontend.Scope == lb.Rest || ours && at(port.ClusterIP()):
		return claimant{name, own}
	case ours && slices.ContainsFunc(port.LoadBalancerVIPs(), at):
		return claimant{name, loadBalancer}
	case int(frontend.Address.Port()) == port.NodePort() && frontend.Address.Addr() == s.nodeAddress:
		return claimant{name, nodePort}
	}
	return claimant{name, byHand}
}

// claim notes that a port wants its frontends, and release that it no longer does.
func (s *syncer) claim(name proxy.ServicePortName, port proxy.ServicePort) {
	for _, frontend := range s.frontendsOf(port) {
		claimants, c := s.claims[frontend], s.claimantOf(name, port, frontend)
		if i, has := slices.BinarySearchFunc(claimants, c, compareClaimants); !has {
			s.claims[frontend] = slices.Insert(claimants, i, c)
		}
		s.noteClaims(frontend)
	}
}

func (s *syncer) release(name proxy.ServicePortName, port proxy.ServicePort) {
	for _, frontend := range s.frontendsOf(port) {
		claimants, c := s.claims[frontend], s.claimantOf(name, port, frontend)
		if i, has := slices.BinarySearchFunc(claimants, c, compareClaimants); has {
			s.claims[frontend] = slices.Delete(claimants, i, i+1)
		}
		s.noteClaims(frontend)
	}
}

// noteClaims has a frontend looked at whose claims have changed.
func (s *syncer) noteClaims(frontend lb.Frontend) {
	s.changed.Insert(frontend)
	switch claimants := s.claims[frontend]; {
	case len(claimants) == 0:
		delete(s.claims, frontend)
		s.contested.Delete(frontend)
	case len(claimants) == 1 || frontend.Scope == lb.Rest: // what is besides the ports of a Service all of them want
		s.contested.Delete(frontend)
	case !s.contested.Has(frontend):
		s.contested.Insert(frontend)
		klog.InfoS("Several Service ports want one frontend: the first has it", "frontend", frontend, "servicePort", claimants[0].name, "others", names(claimants[1:]))
	}
}

func names(claimants []claimant) (all []string) {
	for _, c := range claimants {
		all = append(all, c.name.String())
	}
	return all
}

// compareClaimants orders ports, so that of several the same one has a frontend whatever came first: the one with the best title, of those
// the first by name.
func compareClaimants(a, b claimant) int {
	x, y := a.name, b.name
	return cmp.Or(cmp.Compare(a.title, b.title), cmp.Compare(x.Namespace, y.Namespace), cmp.Compare(x.Name, y.Name), cmp.Compare(x.Port, y.Port), cmp.Compare(x.Protocol, y.Protocol))
}
