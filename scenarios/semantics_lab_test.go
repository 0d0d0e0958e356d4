// SPDX-License-Identifier: Apache-2.0

package scenarios_test

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"math"
	"net"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
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

// A family is what tests ask by, and whose addresses they ask.
type family struct {
	name                                 corev1.IPFamily
	number                               int    // among the addresses of a pod of the lab
	node, other, outsider, localhost     string // other is the node's second address
	externals, ingresses                 string // how addresses for the world outside begin, which sites have of their own
	ofInsiders, ofOutsiders, ofEverybody string // ranges
}

var families = []family{
	{
		name: corev1.IPv4Protocol, number: 0, node: "198.18.0.1", other: "198.18.0.200", outsider: "198.51.100.9", localhost: "127.0.0.1",
		externals: "203.0.113.1", ingresses: "203.0.113.2", ofInsiders: "198.18.0.0/24", ofOutsiders: "198.51.100.0/24", ofEverybody: "0.0.0.0/0",
	},
	{
		name: corev1.IPv6Protocol, number: 1, node: "2001:2::1", other: "2001:2::200", outsider: "2001:db8:9::9", localhost: "::1",
		externals: "2001:db8:113::1", ingresses: "2001:db8:113::2", ofInsiders: "2001:2::/120", ofOutsiders: "2001:db8:9::/64", ofEverybody: "::/0",
	},
}

// addressType is the name that slices have for it.
func (f family) addressType() discoveryv1.AddressType { return discoveryv1.AddressType(f.name) }

const (
	zone      = "here"      // the zone of all nodes
	elsewhere = "elsewhere" // the node of endpoints that are not local, and another zone

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
	family
	mode   string
	seat   int // among the sites
	api    kubernetes.Interface
	guests map[string]*guest // pod, near, far, node, outsider
	// names are what tests call addresses.
	names map[string]string
}

// mustOpenSites opens a lab with one node for each mode that this host carries, but for the floors, of which change has made what it likes.
func mustOpenSites(t *testing.T, change func(*clusters.ProxySpec)) []*site {
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
		change(&spec)
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
func mustMoveIn(t *testing.T, s clusters.Site, seat int, api kubernetes.Interface) *site {
	t.Helper()
	hostPod, err := lab.HostPod(s)
	if err != nil {
		t.Fatal(err)
	}
	var beyond []netip.Addr
	for _, f := range families {
		beyond = append(beyond, netip.MustParseAddr(f.outsider))
	}
	outsider, err := s.(clusters.Outsider).Outsider(beyond...)
	if err != nil {
		t.Fatal(err)
	}
	m := &site{Site: s, mode: s.Spec().Name, seat: seat, api: api, names: map[string]string{}, guests: map[string]*guest{}}
	for name, pod := range map[string]clusters.Pod{
		"pod": s.Client(), "node": hostPod, "outsider": outsider, "near": s.Backends()[0], "far": s.Backends()[1],
	} {
		m.guests[name] = mustStart(t, pod)
		for _, a := range m.guests[name].addresses {
			m.names[a.String()] = name
		}
	}
	for _, name := range []string{"near", "far"} {
		var addresses []string
		for _, f := range families {
			m.family = f
			for i := range listening {
				at := m.address(name, i)
				web, alt := join(at, webPort), join(at, altPort)
				addresses = append(addresses, web, alt)
				m.names[web], m.names[alt] = name, name+"-alt"
			}
		}
		m.guests[name].listen(t, addresses...)
	}
	patch := fmt.Sprintf(`{"metadata":{"labels":{%q:%q}}}`, corev1.LabelTopologyZone, zone)
	if _, err := api.CoreV1().Nodes().Patch(t.Context(), m.mode, types.MergePatchType, []byte(patch), metav1.PatchOptions{}); err != nil {
		t.Fatal(err)
	}
	err = s.Enter(func() error {
		// The kernel limits the rate of the ICMP errors that kube-proxy refuses by. What is asked here is whether they come.
		for _, name := range []string{"ipv4/icmp_ratelimit", "ipv6/icmp/ratelimit"} {
			if err := os.WriteFile("/proc/sys/net/"+name, []byte("0"), 0); err != nil {
				return err
			}
		}
		eth0, err := netlink.LinkByName("eth0")
		if err != nil {
			return err
		}
		for _, f := range families {
			// Deprecated, because the kernel would take the newer of two addresses as the source of what the node sends over IPv6.
			address := &netlink.Addr{IPNet: netlink.NewIPNet(net.ParseIP(f.other)), Flags: unix.IFA_F_NODAD, ValidLft: math.MaxInt32}
			if err := netlink.AddrAdd(eth0, address); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return m
}

// address is one of those where a backend pod has servers.
func (s *site) address(backend string, i int) string {
	a := s.guests[backend].addresses[s.number]
	for range i {
		a = a.Next()
	}
	return a.String()
}

// join is net.JoinHostPort for a number.
func join[T ~int | ~int32](host string, port T) string {
	return net.JoinHostPort(host, strconv.Itoa(int(port)))
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
func (s *site) externalIP() string { return fmt.Sprint(s.externals, s.seat) }
func (s *site) ingressIP() string  { return fmt.Sprint(s.ingresses, s.seat) }

// A field is a lab's sites by one family, and a Service that tells when their proxies have seen to all of it that was written.
type field struct {
	sites  []*site
	marker *subject
	turn   int
}

// mustOpenFields opens a lab, which has a field of each family.
func mustOpenFields(t *testing.T, change func(*clusters.ProxySpec)) []*field {
	t.Helper()
	sites := mustOpenSites(t, change)
	var fields []*field
	for _, by := range families {
		f := &field{}
		for _, s := range sites {
			s := *s
			s.family = by
			f.sites = append(f.sites, &s)
		}
		f.marker = f.sites[0].newSubject("marker-"+f.name(), []port{{port: 1}}, nil)
		f.marker.create(t)
		fields = append(fields, f)
	}
	return fields
}

// name is the family's, as names of Services are written.
func (f *field) name() string { return strings.ToLower(string(f.sites[0].family.name)) }

// settle returns when every proxy has carried out what was written before. A proxy has two watches, of Services and of slices: the
// marker changes in both, and by the time that it answers at its new port with its new server, what came before has been seen.
func (f *field) settle(t *testing.T) {
	t.Helper()
	f.mark(t, f.sites)
	// Subtle: kube-proxy carries out at once what it has seen; the agent goes from Service to Service, and SCTP's take milliseconds. What
	// it carries out next comes after all of that.
	var agents []*site
	for _, s := range f.sites {
		if s.Spec().Agent {
			agents = append(agents, s)
		}
	}
	f.mark(t, agents)
}

// mark changes the marker and returns when these sites carry it.
func (f *field) mark(t *testing.T, sites []*site) {
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
	for _, s := range sites {
		q := Question{Network: "tcp", Address: clusterIP(int(p.port))(f.marker), N: 1, Patience: 50 * time.Millisecond}
		g.Go(func() error {
			return host.Poll(ctx, s.mode+" to carry what was written", func() (bool, error) {
				o := s.guests["pod"].ask(q)
				return o.Servers[join(s.address("near", 0), p.target)] == 1, fmt.Errorf("%v", o)
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
	service := &corev1.Service{
		ObjectMeta: metav1.ObjectMeta{Name: name, Namespace: metav1.NamespaceDefault},
		Spec:       corev1.ServiceSpec{IPFamilies: []corev1.IPFamily{s.family.name}},
	}
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
	var made []discoveryv1.Endpoint
	for _, e := range endpoints {
		made = append(made, s.endpoint(e))
	}
	s.writeSlice(t, number, s.addressType(), ports, labels, made)
}

// setOthersSlice writes one of the Service's slices of the other family.
func (s *subject) setOthersSlice(t *testing.T, number int, endpoints ...endpoint) {
	t.Helper()
	there := *s.site
	there.family = families[1-s.number]
	other := *s
	other.site = &there
	other.setSlice(t, number, s.ports, nil, endpoints...)
	s.slices = other.slices
}

// setNames writes one of the Service's slices that has the names of hosts.
func (s *subject) setNames(t *testing.T, number int, names ...string) {
	t.Helper()
	s.writeSlice(t, number, discoveryv1.AddressTypeFQDN, s.ports, nil, []discoveryv1.Endpoint{{Addresses: names}})
}

func (s *subject) writeSlice(t *testing.T, number int, of discoveryv1.AddressType, ports []port, labels map[string]string, endpoints []discoveryv1.Endpoint) {
	t.Helper()
	slice := &discoveryv1.EndpointSlice{
		ObjectMeta:  metav1.ObjectMeta{Name: fmt.Sprint(s.service.Name, "-", number), Namespace: s.service.Namespace, Labels: map[string]string{discoveryv1.LabelServiceName: s.service.Name}},
		AddressType: of,
		Endpoints:   endpoints,
	}
	maps.Copy(slice.Labels, labels)
	for _, p := range ports {
		slice.Ports = append(slice.Ports, discoveryv1.EndpointPort{Name: &p.name, Protocol: &p.protocol, Port: &p.target})
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
	return func(s *subject) string { return join(s.service.Spec.ClusterIP, port) }
}

// othersClusterIP is the ClusterIP of the other family.
func othersClusterIP(port int) target {
	return func(s *subject) string { return join(s.service.Spec.ClusterIPs[1], port) }
}

// nodePort is the NodePort of the Service's first port at an address of the node.
func nodePort(at func(family) string) target {
	return func(s *subject) string { return join(at(s.family), s.service.Spec.Ports[0].NodePort) }
}

func nodeIP(f family) string    { return f.node }
func otherIP(f family) string   { return f.other }
func localhost(f family) string { return f.localhost }

// healthPort is where a load balancer asks whether the node has endpoints of the Service.
func healthPort(s *subject) string {
	return join(s.node, s.service.Spec.HealthCheckNodePort)
}

func external(port int) target {
	return func(s *subject) string { return join(s.externalIP(), port) }
}

func ingress(port int) target {
	return func(s *subject) string { return join(s.ingressIP(), port) }
}
