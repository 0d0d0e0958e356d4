// SPDX-License-Identifier: Apache-2.0

package scenarios_test

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sync/errgroup"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"

	"github.com/plimsoll-bench/plimsoll/clusters"
	"github.com/plimsoll-bench/plimsoll/clusters/host"
	"github.com/plimsoll-bench/plimsoll/clusters/lab"
	"github.com/plimsoll-bench/plimsoll/clusters/lab/labtest"
	"github.com/plimsoll-bench/plimsoll/dataplane"
)

const (
	outsiderIP = "198.51.100.9" // beyond the node's uplink
	nodeIP     = "198.18.0.1"
	otherIP    = "198.18.0.200" // the node's second address
	zone       = "here"         // the zone of all nodes
	elsewhere  = "elsewhere"    // the node of endpoints that are not local, and another zone

	// Servers listen at both ports, so that it shows which of a Service's ports they were asked by.
	webPort, altPort = 9000, 9001
	// listening is how many addresses of each backend pod's range have servers, from the first on, which is the pod's own.
	listening = 8
)

// Nodes of these modes do not carry the traffic of some clients, because of how the lab starts them and not for what a mode can do:
// nobody asks from there.
var leftOut = map[string]map[string]string{
	"ebpf": {"outsider": "the node's agent runs without --devices, so it sees no packets from outside"},
}

// A site is a node of the lab with clients and servers. All sites have the same addresses, and each has a Node object of its own that
// bears its mode's name: an endpoint is local to one of them at most, so each has Services of its own.
type site struct {
	clusters.Site
	mode   string
	number int
	api    kubernetes.Interface
	guests map[string]*guest // pod, near, far, node, outsider
	// names are what tests call addresses.
	names map[string]string
}

// mustOpenSites opens a lab with one node for each mode that this host carries, but for the floors.
func mustOpenSites(t *testing.T) []*site {
	t.Helper()
	if testing.Short() {
		t.Skip("stands up a lab: not in -short")
	}
	bin := labtest.Bin(t, "../bin")
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	t.Setenv(programVariable, mustBuild(t))
	plan := clusters.Plan{Name: fmt.Sprintf("test-semantics-%d", os.Getpid()), Dir: t.TempDir(), Bin: bin, Program: self}
	for _, m := range dataplane.Modes {
		spec := m.Spec(dataplane.Settings{})
		// IPVS has its virtual addresses on a device of the node, which is another behaviour in many rows, and none that Kubernetes
		// goes on with (KEP-5495 deprecates it).
		if m.Floor() == "" || spec.KubeProxy == "" && !spec.Agent || spec.KubeProxy == "ipvs" {
			continue
		}
		if err := m.Supported(t.Context()); errors.Is(err, clusters.ErrNotSupported) {
			t.Logf("%s is left out: %v", m.Name(), err)
			continue
		} else if err != nil {
			t.Fatalf("%s: %v", m.Name(), err)
		}
		plan.Sites = append(plan.Sites, spec)
	}
	made, err := lab.Provider{}.Create(t.Context(), plan)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := made[0].Close(context.Background()); err != nil {
			t.Error(err)
		}
	})
	config := made[0].RESTConfig()
	config.WarningHandler = rest.NoWarnings{} // that externalIPs are deprecated
	api, err := kubernetes.NewForConfig(config)
	if err != nil {
		t.Fatal(err)
	}
	var sites []*site
	for i, s := range made[0].Sites() {
		if err := s.Err(); err != nil {
			t.Fatal(err)
		}
		sites = append(sites, mustMoveIn(t, s, i, api))
	}
	return sites
}

// mustMoveIn starts the guests of a site.
func mustMoveIn(t *testing.T, s clusters.Site, number int, api kubernetes.Interface) *site {
	t.Helper()
	hostPod, err := lab.HostPod(s)
	if err != nil {
		t.Fatal(err)
	}
	outsider, err := lab.Outsider(s, netip.MustParseAddr(outsiderIP))
	if err != nil {
		t.Fatal(err)
	}
	m := &site{Site: s, mode: s.Spec().Name, number: number, api: api, names: map[string]string{}, guests: map[string]*guest{}}
	for name, pod := range map[string]clusters.Pod{
		"pod": s.Client(), "node": hostPod, "outsider": outsider, "near": s.Backends()[0], "far": s.Backends()[1],
	} {
		m.guests[name], m.names[pod.Address().String()] = mustStart(t, pod), name
	}
	for _, name := range []string{"near", "far"} {
		var addresses []string
		for i := range listening {
			at := m.address(name, i)
			web, alt := fmt.Sprint(at, ":", webPort), fmt.Sprint(at, ":", altPort)
			addresses = append(addresses, web, alt)
			m.names[web], m.names[alt] = name, name+"-alt"
		}
		m.guests[name].listen(t, addresses...)
	}
	patch := fmt.Sprintf(`{"metadata":{"labels":{%q:%q}}}`, corev1.LabelTopologyZone, zone)
	if _, err := api.CoreV1().Nodes().Patch(t.Context(), m.mode, types.MergePatchType, []byte(patch), metav1.PatchOptions{}); err != nil {
		t.Fatal(err)
	}
	err = s.Enter(func() error {
		// The kernel limits the rate of the ICMP errors that kube-proxy refuses by. What is asked here is whether they come.
		if err := os.WriteFile("/proc/sys/net/ipv4/icmp_ratelimit", []byte("0"), 0); err != nil {
			return err
		}
		eth0, err := netlink.LinkByName("eth0")
		if err != nil {
			return err
		}
		address, err := netlink.ParseAddr(otherIP + "/32")
		if err != nil {
			return err
		}
		return netlink.AddrAdd(eth0, address)
	})
	if err != nil {
		t.Fatal(err)
	}
	return m
}

// address is one of those where a backend pod has servers.
func (s *site) address(backend string, i int) string {
	a := s.guests[backend].Address()
	for range i {
		a = a.Next()
	}
	return a.String()
}

// named are the tests' names for addresses, or these where there are none.
func (s *site) named(address string) string {
	if name, ok := s.names[address]; ok {
		return name
	}
	return address
}

// leavesOut says why nobody is to ask from a client here; empty when somebody may.
func (s *site) leavesOut(client string) string { return leftOut[s.mode][client] }

// externalIP and ingressIP are the site's own, as two Services cannot have one address for the world outside.
func (s *site) externalIP() string { return fmt.Sprint("203.0.113.", 10+s.number) }
func (s *site) ingressIP() string  { return fmt.Sprint("203.0.113.", 110+s.number) }

// A field is a lab's sites, and a Service that tells when their proxies have seen to all that was written.
type field struct {
	sites  []*site
	marker *subject
	turn   int
}

func mustOpenField(t *testing.T) *field {
	t.Helper()
	f := &field{sites: mustOpenSites(t)}
	f.marker = f.sites[0].newSubject("marker", []port{{port: 1}}, nil)
	f.marker.create(t)
	return f
}

// settle returns when every proxy has carried out what was written before. A proxy has two watches, of Services and of slices: the
// marker changes in both, and by the time that it answers at its new port with its new server, what came before has been seen.
func (f *field) settle(t *testing.T) {
	t.Helper()
	f.turn++
	p := port{protocol: corev1.ProtocolTCP, port: int32(1 + f.turn), target: webPort}
	if f.turn%2 == 0 {
		p.target = altPort
	}
	f.marker.ports = []port{p}
	f.marker.update(t, func(_ *site, s *corev1.Service) {
		s.Spec.Ports = []corev1.ServicePort{{Protocol: p.protocol, Port: p.port}}
	})
	f.marker.setEndpoints(t, near)
	ctx, cancel := context.WithTimeout(t.Context(), within)
	defer cancel()
	var g errgroup.Group
	for _, s := range f.sites {
		q := Question{Network: "tcp", Address: clusterIP(int(p.port))(f.marker), N: 1, Patience: 50 * time.Millisecond}
		g.Go(func() error {
			return host.Poll(ctx, s.mode+" to carry what was written", func() (bool, error) {
				o := s.guests["pod"].ask(q)
				return o.Servers[fmt.Sprint(s.address("near", 0), ":", p.target)] == 1, fmt.Errorf("%v", o)
			})
		})
	}
	if err := g.Wait(); err != nil {
		t.Fatal(err)
	}
}

// A port is one of a Service's. Protocol zero is TCP, target zero is webPort.
type port struct {
	name         string
	protocol     corev1.Protocol
	port, target int32
}

// An endpoint is one of a Service's, which is ready unless something else is said.
type endpoint struct {
	at                            string // near, which is local, or far, which is not
	number                        int    // of the addresses there
	unready, terminating, serving bool
	zones, nodes                  []string // hints; the node "here" is the site's own
}

var near, far = endpoint{at: "near"}, endpoint{at: "far"}

func (e endpoint) notReady() endpoint { e.unready = true; return e }
func (e endpoint) terminates() endpoint {
	e.unready, e.terminating, e.serving = true, true, true
	return e
}
func (e endpoint) forZone(z string) endpoint { e.zones = append(e.zones, z); return e }
func (e endpoint) forNode(n string) endpoint { e.nodes = append(e.nodes, n); return e }

// A subject is a Service of one site.
type subject struct {
	*site
	service *corev1.Service
	ports   []port
	slices  []string // the names of those that there are
	chosen  string   // the endpoint that a client had, where a row looks at one
}

// newSubject is a Service that change has made something of, and that is nowhere yet.
func (s *site) newSubject(name string, ports []port, change func(*site, *corev1.Service)) *subject {
	service := &corev1.Service{ObjectMeta: metav1.ObjectMeta{Name: name, Namespace: metav1.NamespaceDefault}}
	for i := range ports {
		if ports[i].target == 0 {
			ports[i].target = webPort
		}
		if ports[i].protocol == "" {
			ports[i].protocol = corev1.ProtocolTCP
		}
		service.Spec.Ports = append(service.Spec.Ports, corev1.ServicePort{Name: ports[i].name, Port: ports[i].port, Protocol: ports[i].protocol})
	}
	if change != nil {
		change(s, service)
	}
	return &subject{site: s, service: service, ports: ports}
}

// create writes the Service, whose status is one that a controller would write.
func (s *subject) create(t *testing.T) {
	t.Helper()
	status := s.service.Status
	service, err := s.api.CoreV1().Services(s.service.Namespace).Create(t.Context(), s.service, metav1.CreateOptions{})
	if err == nil && len(status.LoadBalancer.Ingress) > 0 {
		service.Status = status
		service, err = s.api.CoreV1().Services(s.service.Namespace).UpdateStatus(t.Context(), service, metav1.UpdateOptions{})
	}
	if err != nil {
		t.Fatal(err)
	}
	s.service = service
}

// update has change make something else of the Service.
func (s *subject) update(t *testing.T, change func(*site, *corev1.Service)) {
	t.Helper()
	change(s.site, s.service)
	service, err := s.api.CoreV1().Services(s.service.Namespace).Update(t.Context(), s.service, metav1.UpdateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	s.service = service
}

// remove deletes the Service and its slices.
func (s *subject) remove(t *testing.T) {
	t.Helper()
	for _, name := range s.slices {
		if err := s.api.DiscoveryV1().EndpointSlices(s.service.Namespace).Delete(t.Context(), name, metav1.DeleteOptions{}); err != nil {
			t.Error(err)
		}
	}
	if err := s.api.CoreV1().Services(s.service.Namespace).Delete(t.Context(), s.service.Name, metav1.DeleteOptions{}); err != nil {
		t.Error(err)
	}
}

// setEndpoints has the first slice hold these endpoints and the Service's own ports.
func (s *subject) setEndpoints(t *testing.T, endpoints ...endpoint) {
	t.Helper()
	s.setSlice(t, 0, s.ports, nil, endpoints...)
}

// setSlice writes one of the Service's slices.
func (s *subject) setSlice(t *testing.T, number int, ports []port, labels map[string]string, endpoints ...endpoint) {
	t.Helper()
	slice := &discoveryv1.EndpointSlice{
		ObjectMeta:  metav1.ObjectMeta{Name: fmt.Sprint(s.service.Name, "-", number), Namespace: s.service.Namespace, Labels: map[string]string{discoveryv1.LabelServiceName: s.service.Name}},
		AddressType: discoveryv1.AddressTypeIPv4,
	}
	for name, value := range labels {
		slice.Labels[name] = value
	}
	for _, p := range ports {
		slice.Ports = append(slice.Ports, discoveryv1.EndpointPort{Name: &p.name, Protocol: &p.protocol, Port: &p.target})
	}
	for _, e := range endpoints {
		slice.Endpoints = append(slice.Endpoints, s.endpoint(e))
	}
	api := s.api.DiscoveryV1().EndpointSlices(s.service.Namespace)
	var err error
	if slices.Contains(s.slices, slice.Name) {
		_, err = api.Update(t.Context(), slice, metav1.UpdateOptions{})
	} else {
		_, err = api.Create(t.Context(), slice, metav1.CreateOptions{})
		s.slices = append(s.slices, slice.Name)
	}
	if err != nil {
		t.Fatal(err)
	}
}

func (s *site) endpoint(e endpoint) discoveryv1.Endpoint {
	ready, serving, nodeName := !e.unready, !e.unready || e.serving, elsewhere
	if e.at == "near" {
		nodeName = s.mode
	}
	made := discoveryv1.Endpoint{
		Addresses:  []string{s.address(e.at, e.number)},
		NodeName:   &nodeName,
		Conditions: discoveryv1.EndpointConditions{Ready: &ready, Serving: &serving, Terminating: &e.terminating},
	}
	if len(e.zones)+len(e.nodes) > 0 {
		made.Hints = &discoveryv1.EndpointHints{}
	}
	for _, z := range e.zones {
		made.Hints.ForZones = append(made.Hints.ForZones, discoveryv1.ForZone{Name: z})
	}
	for _, n := range e.nodes {
		if n == "here" {
			n = s.mode
		}
		made.Hints.ForNodes = append(made.Hints.ForNodes, discoveryv1.ForNode{Name: n})
	}
	return made
}

// A target is where a subject is asked.
type target func(*subject) string

func clusterIP(port int) target {
	return func(s *subject) string { return fmt.Sprint(s.service.Spec.ClusterIP, ":", port) }
}

// nodePort is the NodePort of the Service's first port at an address.
func nodePort(address string) target {
	return func(s *subject) string { return fmt.Sprint(address, ":", s.service.Spec.Ports[0].NodePort) }
}

// healthPort is where a load balancer asks whether the node has endpoints of the Service.
func healthPort(s *subject) string {
	return fmt.Sprint(nodeIP, ":", s.service.Spec.HealthCheckNodePort)
}

func external(port int) target {
	return func(s *subject) string { return fmt.Sprint(s.externalIP(), ":", port) }
}

func ingress(port int) target {
	return func(s *subject) string { return fmt.Sprint(s.ingressIP(), ":", port) }
}
