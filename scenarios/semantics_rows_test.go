// SPDX-License-Identifier: Apache-2.0

package scenarios_test

import (
	"maps"
	"testing"

	corev1 "k8s.io/api/core/v1"
)

// Clients of a step.
var (
	fromPod     = []string{"pod"}
	fromNode    = []string{"node"}
	fromOutside = []string{"outsider"}
	insiders    = []string{"pod", "node"}
	anybody     = []string{"pod", "node", "outsider"}
)

// Reasons why modes differ.
const (
	// What the references differ in.
	unrouted    = "iptables mode has no rule for other ports and lets the packet pass, as if there were no Service, and so does a socket"
	anyLocal    = "iptables mode serves NodePorts at all addresses of the node, nftables mode at its primary one"
	notFromNode = "iptables mode refuses at addresses for the world outside in FORWARD and INPUT, which what the node itself sends does not pass"
	learntFirst = "the packet of the node itself is refused as it is sent: the sender learns that by EPERM, before the ICMP error comes"

	// What sockets differ in, where there is no packet yet.
	inside        = "a socket that is connected to the pod's own address sends nothing to the node"
	boundToOne    = "conntrack gives the flow another endpoint; a socket that is connected to one is ended, and its process connects anew"
	unlooked      = "kube-proxy looks for entries of conntrack that lead nowhere when endpoints change, the agent when an address does, too"
	untold        = "the kernel tells an unconnected socket of no ICMP error (udp(7)); the hook has sendto(2) fail"
	sameTuple     = "both sockets would be connected from one port to one port of the endpoint; NAT changes the client's port"
	noSCTP        = "no socket hook sees SCTP, and the lab's agent of this mode has no devices, whose packets it would look at"
	unmasqueraded = "a socket is connected to the endpoint before there is a packet, whose source is the client's own"
)

// bySockets is what is seen in mode ebpf.
func bySockets(want string) map[string]string { return map[string]string{"ebpf": want} }

// byIPTables is what is seen in both iptables modes, and byKubeProxy in all of kube-proxy's.
func byIPTables(want string) map[string]string {
	return map[string]string{"iptables": want, "iptables-legacy": want}
}
func byKubeProxy(want string) map[string]string {
	return together(byIPTables(want), map[string]string{"nftables": want})
}

func together(these ...map[string]string) map[string]string {
	made := map[string]string{}
	for _, wants := range these {
		maps.Copy(made, wants)
	}
	return made
}

// What services are made of.
func nodePorts(_ *site, s *corev1.Service) { s.Spec.Type = corev1.ServiceTypeNodePort }
func affinity(_ *site, s *corev1.Service)  { s.Spec.SessionAffinity = corev1.ServiceAffinityClientIP }
func dualStack(m *site, s *corev1.Service) {
	both := corev1.IPFamilyPolicyRequireDualStack
	s.Spec.IPFamilyPolicy, s.Spec.IPFamilies = &both, []corev1.IPFamily{m.family.name, families[1-m.number].name}
}
func externalIPs(m *site, s *corev1.Service) { s.Spec.ExternalIPs = []string{m.externalIP()} }
func withoutNodePorts(_ *site, s *corev1.Service) {
	none := false
	s.Spec.AllocateLoadBalancerNodePorts = &none
}
func internalLocal(_ *site, s *corev1.Service) {
	local := corev1.ServiceInternalTrafficPolicyLocal
	s.Spec.InternalTrafficPolicy = &local
}
func externalLocal(_ *site, s *corev1.Service) {
	s.Spec.ExternalTrafficPolicy = corev1.ServiceExternalTrafficPolicyLocal
}
func balanced(m *site, s *corev1.Service) {
	s.Spec.Type = corev1.ServiceTypeLoadBalancer
	s.Status.LoadBalancer.Ingress = []corev1.LoadBalancerIngress{{IP: m.ingressIP()}}
}
func balancedAs(mode corev1.LoadBalancerIPMode) func(*site, *corev1.Service) {
	return func(m *site, s *corev1.Service) {
		balanced(m, s)
		s.Status.LoadBalancer.Ingress[0].IPMode = &mode
	}
}
func hostname(_ *site, s *corev1.Service) {
	s.Spec.Type = corev1.ServiceTypeLoadBalancer
	s.Status.LoadBalancer.Ingress = []corev1.LoadBalancerIngress{{Hostname: "lb.example"}}
}
func ranges(from func(family) []string) func(*site, *corev1.Service) {
	return func(m *site, s *corev1.Service) { s.Spec.LoadBalancerSourceRanges = from(m.family) }
}
func ofInsiders(f family) []string  { return []string{f.ofInsiders} }
func ofOutsiders(f family) []string { return []string{" " + f.ofOutsiders + " "} }
func ofAll(f family) []string       { return []string{f.ofOutsiders, f.ofEverybody} }
func all(changes ...func(*site, *corev1.Service)) func(*site, *corev1.Service) {
	return func(m *site, s *corev1.Service) {
		for _, change := range changes {
			change(m, s)
		}
	}
}

// What becomes of them.
func endpoints(these ...endpoint) func(*testing.T, *subject) {
	return func(t *testing.T, s *subject) { t.Helper(); s.setEndpoints(t, these...) }
}
func becomes(change func(*site, *corev1.Service)) func(*testing.T, *subject) {
	return func(t *testing.T, s *subject) { t.Helper(); s.update(t, change) }
}

// chosenLeaves takes the endpoint away that a client had.
func chosenLeaves(t *testing.T, s *subject) {
	t.Helper()
	stays := near
	if s.chosen == "near" {
		stays = far
	}
	s.setEndpoints(t, stays)
}

// chosenTerminates has the endpoint that a client had go on serving for a while, while the other one is ready.
func chosenTerminates(t *testing.T, s *subject) {
	t.Helper()
	if s.chosen == "near" {
		s.setEndpoints(t, near.terminates(), far)
	} else {
		s.setEndpoints(t, near, far.terminates())
	}
}

// gone deletes the Service and has its ClusterIP be nobody's; the row's end deletes another one.
func gone(t *testing.T, s *subject) {
	t.Helper()
	former := s.service.Spec.ClusterIP
	s.remove(t)
	s.slices = nil
	s.service.Name += "-after"
	s.service.ResourceVersion, s.service.Spec.ClusterIP, s.service.Spec.ClusterIPs = "", "", nil
	s.create(t)
	s.service.Spec.ClusterIP = former
}

var sctp = []port{{protocol: corev1.ProtocolSCTP, port: 80}}

var rows = []row{
	{name: "ClusterIP over TCP", steps: []step{
		{from: insiders, want: "near+far saw itself"},
		{from: fromOutside, want: "near+far saw node"},
	}},
	{name: "ClusterIP over UDP", ports: []port{{protocol: corev1.ProtocolUDP, port: 80}}, steps: []step{
		{from: insiders, network: "udp", want: "near+far saw itself"},
		{from: fromOutside, network: "udp", want: "near+far saw node"},
	}},
	{name: "ClusterIP over SCTP", ports: sctp, steps: []step{
		{from: insiders, network: "sctp", want: "near+far saw itself", differs: bySockets(silence), why: noSCTP},
		{from: fromOutside, network: "sctp", want: "near+far saw node"},
	}},
	{name: "the world outside over SCTP", ports: sctp, service: all(balanced, externalIPs, externalLocal), steps: append(
		externally(step{network: "sctp", from: fromOutside, want: "near saw outsider"}),
		append(externally(step{change: endpoints(far), network: "sctp", from: fromOutside, want: silence}),
			step{network: "sctp", from: fromPod, to: nodePort(nodeIP), want: "far saw pod", differs: bySockets(unspoken), why: noSCTP},
			step{network: "sctp", from: fromPod, to: external(80), want: "far saw pod", differs: bySockets(silence), why: noSCTP},
			step{network: "sctp", from: fromPod, to: ingress(80), want: "far saw pod", differs: bySockets(silence), why: noSCTP})...,
	)},
	{name: "affinity over SCTP", ports: sctp, service: affinity, steps: []step{
		{network: "sctp", want: "one saw pod", differs: bySockets(silence), why: noSCTP},
		{change: chosenLeaves, network: "sctp", want: "the other saw pod", differs: bySockets(silence), why: noSCTP},
		{change: endpoints(near, far), network: "sctp", want: "the same saw pod", differs: bySockets(silence), why: noSCTP},
	}},
	{name: "no endpoints over SCTP", ports: sctp, service: nodePorts, endpoints: []endpoint{}, steps: []step{
		{from: []string{"pod", "outsider"}, network: "sctp", want: refused, differs: bySockets(silence), why: noSCTP},
		{from: fromOutside, network: "sctp", to: nodePort(nodeIP), want: refused},
	}},
	{name: "hairpin over SCTP", ports: sctp, endpoints: []endpoint{near}, steps: []step{
		{from: []string{"near"}, network: "sctp", want: "near saw node", differs: bySockets(silence), why: noSCTP},
	}},
	{name: "named ports that differ from slice to slice", ports: []port{{name: "web", port: 80}, {name: "alt", port: 81, target: altPort}}, endpoints: []endpoint{near}, steps: []step{
		{change: func(t *testing.T, s *subject) {
			s.setSlice(t, 1, []port{{name: "web", protocol: corev1.ProtocolTCP, target: altPort}, {name: "alt", protocol: corev1.ProtocolTCP, target: webPort}}, nil, far)
		}, want: "near+far-alt saw pod"},
		{to: clusterIP(81), want: "near-alt+far saw pod"},
	}},
	{name: "one port over TCP and UDP", ports: []port{{name: "tcp", port: 80}, {name: "udp", protocol: corev1.ProtocolUDP, port: 80, target: altPort}}, steps: []step{
		{want: "near+far saw pod"},
		{network: "udp", want: "near-alt+far-alt saw pod"},
	}},
	{name: "dual stack", service: dualStack, endpoints: []endpoint{near}, steps: []step{
		{change: func(t *testing.T, s *subject) { s.setOthersSlice(t, 1, far) }, from: insiders, want: "near saw itself"},
		{from: insiders, to: othersClusterIP(80), slow: true, want: "far saw itself"},
		{change: endpoints(), want: refused},
		{to: othersClusterIP(80), want: "far saw pod"},
	}},
	{name: "a slice of the other family", endpoints: []endpoint{near}, steps: []step{
		{change: func(t *testing.T, s *subject) { s.setOthersSlice(t, 1, far) }, want: "near saw pod"},
		{change: endpoints(), want: refused},
	}},
	{name: "a slice of names of hosts", endpoints: []endpoint{near}, steps: []step{
		{change: func(t *testing.T, s *subject) { s.setNames(t, 1, "far.example") }, want: "near saw pod"},
		{change: endpoints(), want: refused},
	}},
	{name: "IPv4 mapped into IPv6", only: corev1.IPv4Protocol, ports: []port{{name: "tcp", port: 80}, {name: "udp", protocol: corev1.ProtocolUDP, port: 80}}, steps: []step{
		{from: insiders, network: "tcp6", want: "near+far saw itself"},
		{from: insiders, network: "udp6", want: "near+far saw itself"},
		{change: endpoints(), from: insiders, network: "tcp6", want: refused},
	}},
	{name: "affinity", service: all(affinity, externalIPs), steps: []step{
		{want: "one saw pod"},
		{to: external(80), want: "the same saw node", differs: bySockets("the same saw pod"), why: unmasqueraded},
		{change: chosenLeaves, want: "the other saw pod"},
		{change: endpoints(near, far), want: "the same saw pod"},
	}},
	{name: "affinity of an outside client", service: all(affinity, nodePorts, externalIPs), steps: []step{
		{from: fromOutside, want: "one saw node"},
		{from: fromOutside, to: nodePort(nodeIP), want: "the same saw node"},
		{from: fromOutside, to: external(80), want: "the same saw node"},
	}},
	{name: "affinity over UDP", ports: []port{{protocol: corev1.ProtocolUDP, port: 80}}, service: affinity, steps: []step{
		{network: "udp", want: "one saw pod"},
		{change: chosenLeaves, network: "udp", want: "the other saw pod"},
		{change: endpoints(near, far), network: "udp", want: "the same saw pod"},
	}},
	{name: "affinity to an endpoint that becomes unready", service: affinity, steps: []step{
		{want: "one saw pod"},
		{change: func(t *testing.T, s *subject) {
			if s.chosen == "near" {
				s.setEndpoints(t, near.notReady(), far)
			} else {
				s.setEndpoints(t, near, far.notReady())
			}
		}, want: "the other saw pod"},
	}},
	{name: "no endpoints", ports: []port{{name: "tcp", port: 80}, {name: "udp", protocol: corev1.ProtocolUDP, port: 80}}, service: all(nodePorts, externalIPs), endpoints: []endpoint{}, steps: []step{
		{from: anybody, want: refused},
		{from: []string{"pod", "outsider"}, network: "udp", want: refused},
		{from: fromNode, network: "udp", want: refused, differs: byKubeProxy(notPermitted), why: learntFirst},
		{from: []string{"pod", "outsider"}, to: external(80), want: refused},
		{from: fromNode, to: external(80), want: refused, differs: byIPTables(silence), why: notFromNode},
		{from: anybody, to: nodePort(nodeIP), want: refused},
		{change: endpoints(near.notReady()), want: refused},
	}},
	{name: "internal policy Local", service: internalLocal, steps: []step{
		{from: insiders, want: "near saw itself"},
		{from: fromOutside, want: "near saw node"},
		{change: endpoints(far), from: anybody, want: silence},
		{change: endpoints(), from: anybody, want: refused},
	}},
	{name: "internal policy Local over UDP", ports: []port{{protocol: corev1.ProtocolUDP, port: 80}}, service: internalLocal, steps: []step{
		{network: "udp", want: "near saw pod"},
		{change: endpoints(far), network: "udp", want: silence},
	}},
	{name: "unknown port of a ClusterIP", steps: []step{
		{from: anybody, to: clusterIP(81), want: refused, differs: together(byIPTables(silence), bySockets(silence)), why: unrouted},
		{from: fromPod, network: "udp", to: clusterIP(81), want: refused, differs: together(byIPTables(silence), bySockets(silence)), why: unrouted},
	}},
	{name: "ping of a ClusterIP", steps: []step{
		{from: []string{"pod", "outsider"}, network: "icmp", want: refused, differs: together(byIPTables(silence), bySockets(silence)), why: unrouted},
		{from: fromNode, network: "icmp", want: refused,
			differs: together(byIPTables(silence), bySockets(silence), map[string]string{"nftables": notPermitted}), why: unrouted + "; " + learntFirst},
	}},
	{name: "a ClusterIP of no Service", steps: []step{
		{want: "near+far saw pod"},
		{change: gone, from: anybody, want: silence},
	}},
	{name: "hairpin", endpoints: []endpoint{near}, steps: []step{
		{from: []string{"near"}, want: "near saw node", differs: bySockets("near saw near"), why: inside},
	}},
	{name: "hairpin over UDP", ports: []port{{protocol: corev1.ProtocolUDP, port: 80}}, endpoints: []endpoint{near}, steps: []step{
		{from: []string{"near"}, network: "udp", want: "near saw node", differs: bySockets("near saw near"), why: inside},
	}},
	{name: "hairpin by a NodePort", service: all(nodePorts, externalLocal), endpoints: []endpoint{near}, steps: []step{
		{from: []string{"near"}, to: nodePort(nodeIP), want: "near saw node", differs: bySockets("near saw near"), why: inside},
	}},
	{name: "NodePort", service: nodePorts, steps: []step{
		{from: anybody, to: nodePort(nodeIP), want: "near+far saw node", differs: bySockets("near+far saw itself"), why: unmasqueraded},
	}},
	{name: "NodePort over UDP", ports: []port{{protocol: corev1.ProtocolUDP, port: 80}}, service: nodePorts, steps: []step{
		{from: anybody, network: "udp", to: nodePort(nodeIP), want: "near+far saw node", differs: bySockets("near+far saw itself"), why: unmasqueraded},
	}},
	{name: "NodePort at the node's second address", service: nodePorts, steps: []step{
		{from: anybody, to: nodePort(otherIP), want: refused, differs: byIPTables("near+far saw node"), why: anyLocal},
	}},
	{name: "NodePort on localhost", only: corev1.IPv6Protocol, service: nodePorts, steps: []step{
		{from: fromNode, to: nodePort(localhost), want: refused},
	}},
	{name: "NodePort on localhost", only: corev1.IPv4Protocol, service: nodePorts, steps: []step{
		{from: fromNode, to: nodePort(localhost), want: refused, differs: byIPTables("near+far saw node"), why: anyLocal},
	}},
	{name: "externalIPs", service: externalIPs, steps: []step{
		{from: anybody, to: external(80), want: "near+far saw node", differs: bySockets("near+far saw itself"), why: unmasqueraded},
	}},
	{name: "unknown port of an address for the world outside", service: all(balanced, externalIPs), steps: []step{
		{from: anybody, to: external(81), want: silence},
		{from: anybody, to: ingress(81), want: silence},
	}},
	{name: "externalIPs over UDP", ports: []port{{protocol: corev1.ProtocolUDP, port: 80}}, service: externalIPs, steps: []step{
		{from: anybody, network: "udp", to: external(80), want: "near+far saw node", differs: bySockets("near+far saw itself"), why: unmasqueraded},
	}},
	{name: "load balancer, no mode", service: balanced, steps: []step{
		{from: anybody, to: ingress(80), want: "near+far saw node", differs: bySockets("near+far saw itself"), why: unmasqueraded},
	}},
	{name: "load balancer, mode VIP", service: balancedAs(corev1.LoadBalancerIPModeVIP), steps: []step{
		{from: anybody, to: ingress(80), want: "near+far saw node", differs: bySockets("near+far saw itself"), why: unmasqueraded},
	}},
	{name: "load balancer, mode Proxy", service: balancedAs(corev1.LoadBalancerIPModeProxy), steps: []step{
		{from: anybody, to: ingress(80), want: silence},
		{from: fromOutside, to: nodePort(nodeIP), want: "near+far saw node"},
	}},
	{name: "load balancer with a hostname only", service: hostname, steps: []step{
		{from: anybody, to: ingress(80), want: silence},
		{from: fromOutside, to: nodePort(nodeIP), want: "near+far saw node"},
	}},
	{name: "load balancer without NodePorts", service: all(balanced, withoutNodePorts), steps: []step{
		{from: anybody, to: ingress(80), want: "near+far saw node", differs: bySockets("near+far saw itself"), why: unmasqueraded},
	}},
	{name: "source ranges", service: all(balanced, externalIPs, ranges(ofOutsiders)), steps: []step{
		{from: fromOutside, to: ingress(80), want: "near+far saw node"},
		{from: insiders, to: ingress(80), want: silence},
		{from: insiders, want: "near+far saw itself"},
		{from: fromPod, to: external(80), want: "near+far saw node", differs: bySockets("near+far saw itself"), why: unmasqueraded},
		{from: fromPod, to: nodePort(nodeIP), want: "near+far saw node", differs: bySockets("near+far saw itself"), why: unmasqueraded},
		{change: becomes(ranges(ofInsiders)), from: fromOutside, to: ingress(80), want: silence},
		{from: fromOutside, to: external(80), want: "near+far saw node"},
		{from: fromOutside, to: nodePort(nodeIP), want: "near+far saw node"},
		{from: insiders, to: ingress(80), want: "near+far saw node", differs: bySockets("near+far saw itself"), why: unmasqueraded},
		{change: becomes(ranges(ofAll)), from: anybody, to: ingress(80), want: "near+far saw node", differs: bySockets("near+far saw itself"), why: unmasqueraded},
	}},
	{name: "external policy Local", service: all(balanced, externalIPs, externalLocal), steps: append(append(
		externally(step{from: fromOutside, want: "near saw outsider"}, step{from: fromPod, want: "near+far saw pod"}, step{from: fromNode, want: "near+far saw node"}),
		externally(step{change: endpoints(far), from: fromOutside, want: silence}, step{from: insiders, want: "far saw itself"})...),
		append(externally(step{change: endpoints(), from: []string{"pod", "outsider"}, want: refused}),
			step{from: fromNode, to: nodePort(nodeIP), want: refused},
			step{from: fromNode, to: external(80), want: refused, differs: byIPTables(silence), why: notFromNode},
			step{from: fromNode, to: ingress(80), want: refused, differs: byIPTables(silence), why: notFromNode})...,
	)},
	{name: "health check of a load balancer", service: all(balanced, externalLocal), steps: []step{
		{from: anybody, network: "http", to: healthPort, want: healthy},
		{change: endpoints(far), from: anybody, network: "http", to: healthPort, slow: true, want: unhealthy},
		{change: endpoints(near.terminates()), from: anybody, network: "http", to: healthPort, slow: true, want: unhealthy},
		{change: endpoints(near.terminates(), far), from: anybody, network: "http", to: healthPort, slow: true, want: unhealthy},
		{change: endpoints(near), from: anybody, network: "http", to: healthPort, slow: true, want: healthy},
	}},
	{name: "external and internal policy Local", service: all(nodePorts, externalLocal, internalLocal), steps: []step{
		{from: insiders, want: "near saw itself"},
		{from: fromPod, to: nodePort(nodeIP), want: "near+far saw pod"},
		{from: fromOutside, to: nodePort(nodeIP), want: "near saw outsider"},
	}},
	{name: "terminating endpoints", service: nodePorts, endpoints: []endpoint{near.terminates(), far.terminates()}, steps: []step{
		{want: "near+far saw pod"},
		{change: endpoints(near.terminates(), far), want: "far saw pod"},
		{change: endpoints(near.terminates(), far.notReady()), want: "near saw pod"},
	}},
	{name: "a terminating local endpoint", service: all(nodePorts, externalLocal), endpoints: []endpoint{near.terminates(), far}, steps: []step{
		{from: fromPod, to: nodePort(nodeIP), want: "far saw pod"},
		{from: fromOutside, to: nodePort(nodeIP), want: "near saw outsider"},
	}},
	{name: "a terminating local endpoint, internal policy", service: internalLocal, endpoints: []endpoint{near.terminates(), far}, steps: []step{
		{want: "near saw pod"},
	}},
	{name: "publishNotReadyAddresses", service: func(_ *site, s *corev1.Service) { s.Spec.PublishNotReadyAddresses = true }, endpoints: []endpoint{near, far.notReady()}, steps: []step{
		{want: "near saw pod"},
	}},
	{name: "hints of zones", endpoints: []endpoint{near.forZone(zone), far.forZone(elsewhere)}, steps: []step{
		{want: "near saw pod", slow: true},
		{change: endpoints(near.forZone(elsewhere), far.forZone(elsewhere)), want: "near+far saw pod"},
		{change: endpoints(near.forZone(zone), far), want: "near+far saw pod"},
	}},
	{name: "hints of nodes", endpoints: []endpoint{near.forZone(zone).forNode("here"), far.forZone(zone).forNode(elsewhere)}, steps: []step{
		{want: "near saw pod"},
		{change: endpoints(near.forZone(elsewhere).forNode(elsewhere), far.forZone(zone).forNode(elsewhere)), want: "far saw pod"},
	}},
	{name: "ExternalName", service: externalIPs, steps: []step{
		{want: "near+far saw pod"},
		{change: becomes(func(_ *site, s *corev1.Service) {
			s.Spec.Type, s.Spec.ExternalName, s.Spec.ClusterIP, s.Spec.ClusterIPs = corev1.ServiceTypeExternalName, "example.com", "", nil
		}), to: external(80), want: silence},
	}},
	{name: "headless", service: func(m *site, s *corev1.Service) { externalIPs(m, s); s.Spec.ClusterIP = corev1.ClusterIPNone }, steps: []step{
		{to: external(80), want: silence},
	}},
	{name: "of another proxy", service: func(_ *site, s *corev1.Service) {
		s.Labels = map[string]string{"service.kubernetes.io/service-proxy-name": "another"}
	}, steps: []step{
		{from: anybody, want: silence},
	}},
	{name: "a headless Service's slice", endpoints: []endpoint{near}, steps: []step{
		{change: func(t *testing.T, s *subject) {
			s.setSlice(t, 1, s.ports, map[string]string{corev1.IsHeadlessService: ""}, far)
		}, want: "near saw pod"},
	}},
	{name: "an endpoint in two slices", endpoints: []endpoint{near.terminates()}, steps: []step{
		{change: func(t *testing.T, s *subject) { s.setSlice(t, 1, s.ports, nil, near, far) }, want: "near+far saw pod"},
	}},
	{name: "UDP when an endpoint leaves, unconnected", ports: []port{{protocol: corev1.ProtocolUDP, port: 80}}, steps: []step{
		{network: "udp", loose: true, want: "one saw pod"},
		{network: "udp", loose: true, want: "the same saw pod"},
		{change: chosenLeaves, network: "udp", loose: true, want: "the other saw pod", slow: true},
	}},
	{name: "UDP when an endpoint leaves, connected", ports: []port{{protocol: corev1.ProtocolUDP, port: 80}}, steps: []step{
		{network: "udp", keep: "udp", want: "one saw pod"},
		{network: "udp", keep: "udp", want: "the same saw pod"},
		{change: chosenLeaves, network: "udp", keep: "udp", want: "the other saw pod", slow: true, differs: bySockets(ended), why: boundToOne},
	}},
	{name: "UDP when an endpoint terminates", ports: []port{{protocol: corev1.ProtocolUDP, port: 80}}, steps: []step{
		{network: "udp", keep: "flow", want: "one saw pod"},
		{change: chosenTerminates, network: "udp", keep: "flow", lasting: true, want: "the same saw pod"},
	}},
	{name: "UDP when an endpoint terminates, unconnected", ports: []port{{protocol: corev1.ProtocolUDP, port: 80}}, steps: []step{
		{network: "udp", loose: true, want: "one saw pod"},
		{change: chosenTerminates, network: "udp", loose: true, want: "the same saw pod"},
	}},
	{name: "one server by two ports from one port of the client", ports: []port{{name: "a", port: 80}, {name: "b", port: 81}}, endpoints: []endpoint{near}, steps: []step{
		{keep: "a", port: 9999, want: "near saw pod"},
		{keep: "b", port: 9999, to: clusterIP(81), want: "near saw pod", differs: bySockets(taken), why: sameTuple},
		{keep: "a", want: "near saw pod"},
	}},
	{name: "external policy Local over UDP", ports: []port{{protocol: corev1.ProtocolUDP, port: 80}}, service: all(balanced, externalIPs, externalLocal), steps: append(
		externally(step{network: "udp", from: fromOutside, want: "near saw outsider"}, step{network: "udp", from: fromPod, want: "near+far saw pod"}),
		externally(step{change: endpoints(far), network: "udp", from: fromOutside, want: silence})...,
	)},
	{name: "UDP when an endpoint leaves, from outside", ports: []port{{protocol: corev1.ProtocolUDP, port: 80}}, service: all(nodePorts, externalIPs), steps: []step{
		{from: fromOutside, network: "udp", to: nodePort(nodeIP), keep: "node port", want: "one saw node"},
		{change: chosenLeaves, from: fromOutside, network: "udp", to: nodePort(nodeIP), keep: "node port", want: "the other saw node", slow: true},
		{from: fromOutside, network: "udp", to: external(80), keep: "external", want: "the same saw node"},
		{change: chosenLeaves, from: fromOutside, network: "udp", to: external(80), keep: "external", want: "the other saw node", slow: true},
	}},
	{name: "UDP when an address becomes a Service's", ports: []port{{protocol: corev1.ProtocolUDP, port: 80}}, endpoints: []endpoint{near}, steps: []step{
		{network: "udp", to: external(80), loose: true, want: silence},
		{change: becomes(externalIPs), network: "udp", to: external(80), loose: true, slow: true, want: "near saw node",
			differs: together(byKubeProxy(silence), bySockets("near saw pod")), why: unlooked + "; " + unmasqueraded},
		{change: endpoints(far), network: "udp", to: external(80), loose: true, slow: true, want: "far saw node", differs: bySockets("far saw pod"), why: unmasqueraded},
	}},
	{name: "UDP when the first endpoint comes", ports: []port{{protocol: corev1.ProtocolUDP, port: 80}}, endpoints: []endpoint{}, steps: []step{
		{network: "udp", loose: true, want: silence, differs: bySockets(refused), why: untold},
		{change: endpoints(near), network: "udp", loose: true, want: "near saw pod"},
	}},
	{name: "TCP when an endpoint leaves", steps: []step{
		{keep: "tcp", want: "one saw pod"},
		{change: chosenLeaves, keep: "tcp", want: "the same saw pod"},
		{change: endpoints(), keep: "tcp", want: "the same saw pod"},
	}},
	{name: "TCP when an endpoint leaves, from outside", service: nodePorts, steps: []step{
		{from: fromOutside, to: nodePort(nodeIP), keep: "tcp", want: "one saw node"},
		{change: chosenLeaves, from: fromOutside, to: nodePort(nodeIP), keep: "tcp", want: "the same saw node"},
	}},
	{name: "TCP when the Service goes", steps: []step{
		{keep: "going", want: "one saw pod"},
		{change: gone, keep: "going", want: "the same saw pod"},
	}},
}

// externally has steps ask at each of the addresses for the world outside.
func externally(steps ...step) []step {
	var made []step
	for _, st := range steps {
		for i, to := range []target{nodePort(nodeIP), external(80), ingress(80)} {
			st.to = to
			if i > 0 {
				st.change = nil
			}
			made = append(made, st)
		}
	}
	return made
}
