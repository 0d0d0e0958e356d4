// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"net"
	"net/netip"
	"slices"

	v1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/sets"
	"k8s.io/klog/v2"
	"k8s.io/kubernetes/pkg/proxy"
	proxyutil "k8s.io/kubernetes/pkg/proxy/util"
	netutils "k8s.io/utils/net"

	"github.com/plimsoll-bench/plimsoll/dataplane/lb"
)

// frontendsOf lists where a port is served: at its ClusterIP, its external and load balancers' addresses, and its NodePort on this
// node's own address. Where packets are looked at, a ClusterIP refuses at other ports.
func (s *syncer) frontendsOf(port proxy.ServicePort) []lb.Frontend {
	if port.Protocol() == v1.ProtocolSCTP && s.network == nil {
		return nil // no socket hook sees it
	}
	externals := append(slices.Clone(port.ExternalIPs()), port.LoadBalancerVIPs()...)
	frontends := make([]lb.Frontend, 0, len(externals)+3)
	if own, ok := frontendAt(port.ClusterIP(), port.Port(), port.Protocol()); ok {
		frontends = append(frontends, own)
		if s.network != nil {
			frontends = append(frontends, lb.Frontend{Address: netip.AddrPortFrom(own.Address.Addr(), 0), Scope: lb.Rest})
		}
	}
	add := func(address net.IP, number int) {
		if frontend, ok := frontendAt(address, number, port.Protocol()); ok {
			frontends = append(frontends, frontend)
		}
	}
	for _, address := range externals {
		add(address, port.Port())
	}
	if port.NodePort() != 0 && s.nodeAddress.IsValid() {
		add(s.nodeAddress.AsSlice(), port.NodePort())
	}
	return frontends
}

// frontendAt returns false for a protocol that the load balancer does not know, for no address, and for one that means something else in
// each network namespace: a pod's own loopback is no Service's, whatever the status of a load balancer says.
func frontendAt(ip net.IP, port int, protocol v1.Protocol) (lb.Frontend, bool) {
	var number lb.Protocol
	switch protocol {
	case v1.ProtocolTCP:
		number = lb.TCP
	case v1.ProtocolUDP:
		number = lb.UDP
	case v1.ProtocolSCTP:
		number = lb.SCTP
	default:
		return lb.Frontend{}, false
	}
	address, ok := netip.AddrFromSlice(ip)
	address = address.Unmap()
	return lb.Frontend{Address: netip.AddrPortFrom(address, uint16(port)), Protocol: number}, ok && served(address)
}

// served tells whether a Service can be at an address.
func served(address netip.Addr) bool {
	return lb.IsHost(address) && !address.IsLoopback() && !address.IsLinkLocalUnicast()
}

// noteAddresses counts a Service's addresses that cannot be served, and logs those that it did not have before: one that is no address to
// those of IPv4.
func (s *syncer) noteAddresses(old, service *v1.Service) {
	s.mu.Lock()
	defer s.mu.Unlock()
	defer func() { s.status.ignored.WithLabelValues(string(s.family)).Set(float64(s.ignoredAddresses())) }()
	if service == nil {
		delete(s.ignored, types.NamespacedName{Namespace: old.Namespace, Name: old.Name})
		return
	}
	name := types.NamespacedName{Namespace: service.Namespace, Name: service.Name}
	before, now := s.ignored[name], sets.New[string]()
	for _, text := range addressesOf(service) {
		reason := ""
		switch address, err := netip.ParseAddr(text); {
		case netutils.ParseIPSloppy(text) == nil:
			if s.family == v1.IPv4Protocol {
				reason = "it is no address"
			}
		case err != nil || (address.Unmap().Is4() != (s.family == v1.IPv4Protocol)):
			// Of the other IP version; or written as only kube-proxy's own parser reads it, which serves it.
		case !served(address.Unmap()):
			reason = "it means something else in each network namespace, or no host"
		case proxyutil.GetClusterIPByFamily(s.family, service) == "":
			reason = "the Service has no ClusterIP of this IP version"
		}
		if reason == "" {
			continue
		}
		if now.Insert(text); !before.Has(text) {
			klog.InfoS("Address of a Service ignored", "service", name, "address", text, "reason", reason)
		}
	}
	if s.ignored[name] = now; len(now) == 0 {
		delete(s.ignored, name)
	}
}

// addressesOf are those for the world outside, which are not the API server's choice.
func addressesOf(service *v1.Service) []string {
	if proxyutil.ShouldSkipService(service) {
		return nil
	}
	all := slices.Clone(service.Spec.ExternalIPs)
	for _, ingress := range service.Status.LoadBalancer.Ingress {
		if ingress.IP != "" && proxyutil.IsVIPMode(ingress) {
			all = append(all, ingress.IP)
		}
	}
	return all
}

// ignoredAddresses counts those of all Services.
func (s *syncer) ignoredAddresses() (n int) {
	for _, addresses := range s.ignored {
		n += addresses.Len()
	}
	return n
}
