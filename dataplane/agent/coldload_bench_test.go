// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"errors"
	"fmt"
	"net/netip"
	"testing"

	v1 "k8s.io/api/core/v1"
	discovery "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes/fake"

	"github.com/plimsoll-bench/plimsoll/dataplane/lb"
)

// BenchmarkColdLoad times the first sync: all Services, with two endpoints each, are known, and go into maps that are empty. It is for
// profiles; BenchmarkAgent of the program has the same in an agent with a real API server.
func BenchmarkColdLoad(b *testing.B) {
	const services = 50_000
	first := netip.MustParseAddr("198.19.0.1")
	for b.Loop() {
		b.StopTimer()
		balancer, err := lb.Load(lb.Options{})
		if errors.Is(err, lb.ErrNotSupported) {
			b.Skipf("skipped: %v", err)
		}
		if err != nil {
			b.Fatal(err)
		}
		cfg := Config{Client: fake.NewClientset(), NodeName: "here"}
		nodes := informers.NewSharedInformerFactory(cfg.Client, 0).Core().V1().Nodes()
		status := newStatus(balancer, nodes, cfg.NodeName, nil, new(ipv6), newAPIServer(), "")
		s := newSyncer(cfg, v1.IPv4Protocol, balancer, nil, status, nil, nil, func() {})
		address := first
		for i := range services {
			service, slice := anyService(fmt.Sprint("any-", i), address)
			s.OnServiceAdd(service)
			s.OnEndpointSliceAdd(slice)
			address = address.Next()
		}
		s.unsynced = 0
		b.StartTimer()
		if err := s.sync(); err != nil {
			b.Fatal(err)
		}
		b.StopTimer()
		if ipv4, _ := balancer.Counts(); ipv4.Frontends != services {
			b.Fatalf("want %d frontends, got %+v", services, ipv4)
		}
		if err := balancer.Close(); err != nil {
			b.Fatal(err)
		}
		b.StartTimer()
	}
}

// anyService is a Service of one port and its two endpoints.
func anyService(name string, address netip.Addr) (*v1.Service, *discovery.EndpointSlice) {
	port, number, protocol, ready := "http", int32(8080), v1.ProtocolTCP, true
	service := &v1.Service{
		ObjectMeta: metav1.ObjectMeta{Namespace: "fleet", Name: name},
		Spec: v1.ServiceSpec{
			Type: v1.ServiceTypeClusterIP, ClusterIP: address.String(), ClusterIPs: []string{address.String()}, IPFamilies: []v1.IPFamily{v1.IPv4Protocol},
			SessionAffinity: v1.ServiceAffinityNone, Ports: []v1.ServicePort{{Name: port, Port: 80, Protocol: protocol}},
		},
	}
	slice := &discovery.EndpointSlice{
		ObjectMeta:  metav1.ObjectMeta{Namespace: "fleet", Name: name + "-1", Labels: map[string]string{discovery.LabelServiceName: name}},
		AddressType: discovery.AddressTypeIPv4,
		Ports:       []discovery.EndpointPort{{Name: &port, Port: &number, Protocol: &protocol}},
		Endpoints: []discovery.Endpoint{
			{Addresses: []string{"198.18.0.1"}, Conditions: discovery.EndpointConditions{Ready: &ready}},
			{Addresses: []string{"198.18.0.2"}, Conditions: discovery.EndpointConditions{Ready: &ready}},
		},
	}
	return service, slice
}
