// SPDX-License-Identifier: Apache-2.0

package scenarios

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
	"k8s.io/client-go/kubernetes"
	"k8s.io/utils/ptr"

	"github.com/plimsoll-bench/plimsoll/clusters"
	"github.com/plimsoll-bench/plimsoll/scenarios/load"
)

// Ports of the probes.
const (
	streamPort, streamBackendPort     = 81, 8081
	datagramPort, datagramBackendPort = 53, 8053
	firstNodePort                     = 30000
)

// probes are Services beside the fleet that are there when the fleet has been measured: NodePort Services of a TCP port that accepts, a TCP
// port that talks, and a UDP port, with an endpoint in each backend pod.
type probes struct {
	streams, datagrams, nodePorts []netip.AddrPort
	outside                       *load.Driver
	added                         time.Duration // from the write of the first until it answered; 0 on floors
	closers                       []clusters.Process
}

// probeNumber is how many there are: as many as stand for a place in a chain.
const probeNumber = perPosition

// outsiderAddress is that of the client beyond the node.
var outsiderAddress = netip.MustParseAddr("192.0.2.10") // TEST-NET-1, RFC 5737

// probeLimit is how long the probes may take to answer, by the guest's clock.
const probeLimit = 10 * time.Minute

// addProbes writes the probes and returns when they answer. On a floor's node the addresses are those of the backends.
func addProbes(ctx context.Context, s *site, client kubernetes.Interface) (p *probes, err error) {
	p = new(probes)
	defer func() {
		if err != nil {
			err = errors.Join(err, p.close(context.WithoutCancel(ctx)))
		}
	}()
	outsider, ok := s.Site.(clusters.Outsider)
	if !ok {
		return p, errors.New("the site has no client beyond its node")
	}
	pod, err := outsider.Outsider(outsiderAddress)
	if err != nil {
		return p, err
	}
	process, err := pod.Start(ctx, ClientCommand)
	if err != nil {
		return p, err
	}
	p.closers = append(p.closers, process)
	p.outside = load.NewDriver(process.Stdin(), process.Stdout())
	if s.mode.Floor() == "" {
		for _, pod := range s.Backends() {
			p.streams = append(p.streams, netip.AddrPortFrom(pod.Address(), streamBackendPort))
			p.datagrams = append(p.datagrams, netip.AddrPortFrom(pod.Address(), datagramBackendPort))
			p.nodePorts = append(p.nodePorts, netip.AddrPortFrom(pod.Address(), backendPort))
		}
		return p, nil
	}
	for i := range probeNumber {
		if err := p.add(ctx, s, client, i); err != nil {
			return p, err
		}
	}
	return p, p.await(ctx, s)
}

// add writes one probe.
func (p *probes) add(ctx context.Context, s *site, client kubernetes.Interface, i int) error {
	address := s.cluster.ServiceCIDR().Masked().Addr()
	for range 100 + i { // in the band of addresses that are chosen by hand
		address = address.Next()
	}
	name := fmt.Sprintf("probe-%d", i)
	ports := []corev1.ServicePort{
		{Name: "web", Protocol: corev1.ProtocolTCP, Port: servicePort, TargetPort: intstr.FromInt32(backendPort)},
		{Name: "stream", Protocol: corev1.ProtocolTCP, Port: streamPort, TargetPort: intstr.FromInt32(streamBackendPort)},
		{Name: "datagram", Protocol: corev1.ProtocolUDP, Port: datagramPort, TargetPort: intstr.FromInt32(datagramBackendPort)},
	}
	slice := &discoveryv1.EndpointSlice{
		ObjectMeta:  metav1.ObjectMeta{Name: name, Labels: map[string]string{discoveryv1.LabelServiceName: name}},
		AddressType: discoveryv1.AddressTypeIPv4,
	}
	for j := range ports {
		ports[j].NodePort = int32(firstNodePort + len(ports)*i + j)
		slice.Ports = append(slice.Ports, discoveryv1.EndpointPort{Name: &ports[j].Name, Port: ptr.To(ports[j].TargetPort.IntVal), Protocol: &ports[j].Protocol})
	}
	for _, pod := range s.Backends() {
		slice.Endpoints = append(slice.Endpoints, discoveryv1.Endpoint{Addresses: []string{pod.Address().String()}, Conditions: discoveryv1.EndpointConditions{Ready: ptr.To(true)}})
	}
	if _, err := client.DiscoveryV1().EndpointSlices(metav1.NamespaceDefault).Create(ctx, slice, metav1.CreateOptions{}); err != nil {
		return fmt.Errorf("probe: %w", err)
	}
	node, err := s.nodeAddress(ctx, client)
	if err != nil {
		return err
	}
	p.streams = append(p.streams, netip.AddrPortFrom(address, streamPort))
	p.datagrams = append(p.datagrams, netip.AddrPortFrom(address, datagramPort))
	p.nodePorts = append(p.nodePorts, netip.AddrPortFrom(node, uint16(ports[0].NodePort)))
	service := &corev1.Service{
		ObjectMeta: metav1.ObjectMeta{Name: name},
		Spec:       corev1.ServiceSpec{Type: corev1.ServiceTypeNodePort, ExternalTrafficPolicy: corev1.ServiceExternalTrafficPolicyCluster, ClusterIP: address.String(), Ports: ports},
	}
	began := time.Now()
	if _, err := client.CoreV1().Services(metav1.NamespaceDefault).Create(ctx, service, metav1.CreateOptions{}); err != nil {
		return fmt.Errorf("probe: %w", err)
	}
	if i > 0 {
		return nil
	}
	reply, err := s.load.client.Do(ctx, load.Request{Kind: load.Wait, Addresses: []netip.AddrPort{netip.AddrPortFrom(address, servicePort)}, Limit: probeLimit})
	if err != nil {
		return err
	}
	if reply.Unsent > 0 {
		return fmt.Errorf("a new Service did not answer within %v", probeLimit)
	}
	p.added = reply.Began.Add(reply.Elapsed).Sub(began)
	return nil
}

// nodeAddress is what the node's object has.
func (s *site) nodeAddress(ctx context.Context, client kubernetes.Interface) (netip.Addr, error) {
	node, err := client.CoreV1().Nodes().Get(ctx, s.Spec().Name, metav1.GetOptions{})
	if err != nil {
		return netip.Addr{}, err
	}
	for _, a := range node.Status.Addresses {
		if a.Type == corev1.NodeInternalIP {
			return netip.ParseAddr(a.Address)
		}
	}
	return netip.Addr{}, fmt.Errorf("node %s has no address", node.Name)
}

// await returns when all ports of the probes answer, and those at the node that the mode carries.
func (p *probes) await(ctx context.Context, s *site) error {
	reply, err := s.load.client.Do(ctx, load.Request{Kind: load.Wait, Addresses: p.streams, Limit: probeLimit})
	if err == nil && reply.Unsent > 0 {
		err = fmt.Errorf("probes did not answer within %v", probeLimit)
	}
	if err != nil {
		return err
	}
	if s.carriesNodePorts() {
		reply, err := p.outside.Do(ctx, load.Request{Kind: load.Wait, Addresses: p.nodePorts, Limit: probeLimit})
		if err == nil && reply.Unsent > 0 {
			err = fmt.Errorf("NodePorts did not answer within %v", probeLimit)
		}
		if err != nil {
			return err
		}
	}
	for began := time.Now(); ; {
		reply, err := s.load.client.Do(ctx, load.Request{Kind: load.Exchange, Addresses: p.datagrams, Count: len(p.datagrams)})
		if err != nil {
			return err
		}
		if reply.Failed() == 0 {
			return nil
		}
		if time.Since(began) > probeLimit {
			return fmt.Errorf("probes did not answer datagrams within %v: %v", probeLimit, reply.Errors)
		}
	}
}

// carriesNodePorts is false where sockets alone are translated.
func (s *site) carriesNodePorts() bool { return !s.Spec().Agent || s.Spec().Packets }

func (p *probes) close(ctx context.Context) error {
	var errs []error
	for _, c := range p.closers {
		errs = append(errs, c.Close(ctx))
	}
	return errors.Join(errs...)
}
