// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"cmp"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"sync"
	"time"

	v1 "k8s.io/api/core/v1"
	discovery "k8s.io/api/discovery/v1"
	"k8s.io/apimachinery/pkg/util/sets"
	"k8s.io/klog/v2"
	"k8s.io/kubernetes/pkg/proxy"
	proxyconfig "k8s.io/kubernetes/pkg/proxy/config"
	"k8s.io/kubernetes/pkg/proxy/runner"
	utilnode "k8s.io/kubernetes/pkg/util/node"

	"github.com/plimsoll-bench/plimsoll/dataplane/lb"
)

// A syncer turns what the informers see of an IP family into changes of the load balancer. Between syncs it remembers which
// frontends changed, so that a sync looks at those alone.
type syncer struct {
	// Set once.
	family    v1.IPFamily
	nodeName  string
	balancer  *lb.Balancer
	status    *status
	runner    *runner.BoundedFrequencyRunner
	complete  func()
	services  *proxy.ServiceChangeTracker
	endpoints *proxy.EndpointsChangeTracker

	// Guarded by mu.
	mu          sync.Mutex
	unsynced    int // first lists that have not been seen whole: of Services, of slices, of the node
	topology    map[string]string
	nodeAddress netip.Addr // where NodePorts are served; zero until the node says
	ports       proxy.ServicePortMap
	endpointsOf proxy.EndpointsMap
	claims      map[lb.Frontend][]claimant      // who wants a frontend, sorted; the first has it
	contested   sets.Set[lb.Frontend]           // those that several want
	changed     sets.Set[lb.Frontend]           // those to look at in the next sync
	noLocal     sets.Set[proxy.ServicePortName] // ports with a local policy and no local endpoint
	health      *serviceHealth
	pruned      bool // whether a former agent's frontends were looked through
}

var (
	_ proxyconfig.ServiceHandler       = &syncer{}
	_ proxyconfig.EndpointSliceHandler = &syncer{}
	_ proxyconfig.NodeTopologyHandler  = &syncer{}
	_ proxyconfig.NodeHandler          = &syncer{}
)

// newSyncer makes one that calls complete once, when all that it has seen first is carried, as far as that can be.
func newSyncer(cfg Config, family v1.IPFamily, balancer *lb.Balancer, status *status, complete func()) *syncer {
	s := &syncer{
		family:      family,
		nodeName:    cfg.NodeName,
		balancer:    balancer,
		status:      status,
		unsynced:    3,
		ports:       make(proxy.ServicePortMap),
		endpointsOf: make(proxy.EndpointsMap),
		claims:      make(map[lb.Frontend][]claimant),
		contested:   sets.New[lb.Frontend](),
		changed:     sets.New[lb.Frontend](),
		health:      newServiceHealth(cfg, family, status),
		complete:    sync.OnceFunc(complete),
		noLocal:     sets.New[proxy.ServicePortName](),
	}
	s.services = proxy.NewServiceChangeTracker(family, nil, s.portsChanged)
	s.endpoints = proxy.NewEndpointsChangeTracker(family, cfg.NodeName, nil, s.endpointsChanged)
	s.runner = runner.NewBoundedFrequencyRunner(fmt.Sprintf("sync %s", family), s.sync, cfg.MinSyncPeriod, retryPeriod, max(time.Hour, cfg.MinSyncPeriod))
	return s
}

// loop syncs when there is something to, until stop is closed.
func (s *syncer) loop(stop <-chan struct{}) {
	s.status.started(s.family)
	s.runner.Loop(stop)
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.health.close(); err != nil {
		klog.ErrorS(err, "Health checks of Services not ended", "ipFamily", s.family)
	}
}

// request has the next sync run as soon as it may.
func (s *syncer) request() {
	s.mu.Lock()
	ready := s.unsynced == 0
	s.mu.Unlock()
	if ready {
		s.status.queued(s.family)
		s.runner.Run()
	}
}

// OnServiceAdd, OnServiceUpdate and OnServiceDelete note what a Service was and is.
func (s *syncer) OnServiceAdd(service *v1.Service)    { s.OnServiceUpdate(nil, service) }
func (s *syncer) OnServiceDelete(service *v1.Service) { s.OnServiceUpdate(service, nil) }
func (s *syncer) OnServiceUpdate(old, service *v1.Service) {
	if s.services.Update(old, service) {
		s.request()
	}
}

// OnServiceSynced, OnEndpointSlicesSynced and OnNodeSynced are called once each, when all of the first list has been seen.
func (s *syncer) OnServiceSynced()        { s.listed() }
func (s *syncer) OnEndpointSlicesSynced() { s.listed() }
func (s *syncer) OnNodeSynced()           { s.listed() }

// listed counts a first list that has been seen whole. What a former agent left is in use until there are all.
func (s *syncer) listed() {
	s.mu.Lock()
	s.unsynced--
	s.mu.Unlock()
	s.request()
}

// OnEndpointSliceAdd, OnEndpointSliceUpdate and OnEndpointSliceDelete note what a slice is.
func (s *syncer) OnEndpointSliceAdd(slice *discovery.EndpointSlice) { s.sliceChanged(slice, false) }
func (s *syncer) OnEndpointSliceUpdate(_, slice *discovery.EndpointSlice) {
	s.sliceChanged(slice, false)
}
func (s *syncer) OnEndpointSliceDelete(slice *discovery.EndpointSlice) { s.sliceChanged(slice, true) }

func (s *syncer) sliceChanged(slice *discovery.EndpointSlice, remove bool) {
	if s.endpoints.EndpointSliceUpdate(slice, remove) {
		s.request()
	}
}

// OnTopologyChange looks at every frontend again: which endpoints are near may have changed for all.
func (s *syncer) OnTopologyChange(labels map[string]string) {
	s.mu.Lock()
	s.topology = labels
	for frontend := range s.claims {
		s.changed.Insert(frontend)
	}
	s.mu.Unlock()
	s.request()
}

// OnNodeChange moves NodePorts to the node's primary address, where kube-proxy's nftables mode serves them too. A node that has none,
// or is gone, keeps what it had.
func (s *syncer) OnNodeChange(node *v1.Node) {
	addresses, err := utilnode.GetNodeHostIPs(node)
	if err != nil {
		return // it has none yet
	}
	for _, ip := range addresses {
		address, _ := netip.AddrFromSlice(ip)
		if address = address.Unmap(); address.Is4() == (s.family == v1.IPv4Protocol) {
			s.moveNodePorts(address)
		}
	}
}

func (s *syncer) OnNodeDelete(*v1.Node) {}

func (s *syncer) moveNodePorts(address netip.Addr) {
	s.mu.Lock()
	moved := address != s.nodeAddress
	if moved {
		for name, port := range s.ports {
			s.release(name, port)
		}
		s.nodeAddress = address
		for name, port := range s.ports {
			s.claim(name, port)
		}
	}
	s.mu.Unlock()
	if moved {
		s.request()
	}
}

// A claimant is a port that wants a frontend.
type claimant struct {
	name  proxy.ServicePortName
	other bool // the frontend is not at its ClusterIP
}

func claimantOf(name proxy.ServicePortName, port proxy.ServicePort, frontend lb.Frontend) claimant {
	own, _ := frontendAt(port.ClusterIP(), port.Port(), port.Protocol())
	return claimant{name, frontend != own}
}

// claim notes that a port wants its frontends, and release that it no longer does.
func (s *syncer) claim(name proxy.ServicePortName, port proxy.ServicePort) {
	for _, frontend := range s.frontendsOf(port) {
		claimants, c := s.claims[frontend], claimantOf(name, port, frontend)
		if i, has := slices.BinarySearchFunc(claimants, c, compareClaimants); !has {
			s.claims[frontend] = slices.Insert(claimants, i, c)
		}
		s.noteClaims(frontend)
	}
}

func (s *syncer) release(name proxy.ServicePortName, port proxy.ServicePort) {
	for _, frontend := range s.frontendsOf(port) {
		claimants, c := s.claims[frontend], claimantOf(name, port, frontend)
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
	case len(claimants) == 1:
		s.contested.Delete(frontend)
	case !s.contested.Has(frontend):
		s.contested.Insert(frontend)
		klog.InfoS("Several Service ports want one frontend", "frontend", frontend, "servicePort", claimants[0].name, "claims", len(claimants))
	}
}

// compareClaimants orders ports, so that of several the same one has a frontend whatever came first: the one whose ClusterIP it is, which
// nobody takes from it by an external address, else the first by name.
func compareClaimants(a, b claimant) int {
	if a.other != b.other {
		if b.other {
			return -1
		}
		return 1
	}
	x, y := a.name, b.name
	return cmp.Or(cmp.Compare(x.Namespace, y.Namespace), cmp.Compare(x.Name, y.Name), cmp.Compare(x.Port, y.Port), cmp.Compare(x.Protocol, y.Protocol))
}

// portsChanged is told by the tracker what a changed Service was and is, inside of sync.
func (s *syncer) portsChanged(previous, current proxy.ServicePortMap) {
	s.health.portsChanged(previous, current)
	for name, port := range previous {
		s.release(name, port)
		s.noLocal.Delete(name)
	}
	for name, port := range current {
		s.claim(name, port)
	}
}

// endpointsChanged is told by the tracker what a changed Service's endpoints were and are, inside of sync, when ports are known.
func (s *syncer) endpointsChanged(previous, current proxy.EndpointsMap) {
	for _, endpoints := range []proxy.EndpointsMap{previous, current} {
		for name := range endpoints {
			if port, exists := s.ports[name]; exists {
				s.changed.Insert(s.frontendsOf(port)...)
				s.health.endpointsChanged(name)
			}
		}
	}
}

// sync gives the load balancer what changed since it ran last. An error has it run again after retryPeriod.
func (s *syncer) sync() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.unsynced > 0 {
		return nil
	}
	start := time.Now()
	s.ports.Update(s.services)
	triggers := s.endpointsOf.Update(s.endpoints).LastChangeTriggerTimes
	s.prune()

	changes := s.changes()
	err := s.balancer.Sync(changes)
	s.settle(err)
	s.complete()
	if err := s.health.sync(s.endpointsOf); err != nil {
		klog.ErrorS(err, "Health checks of Services not served", "ipFamily", s.family)
	}
	s.status.synced(outcome{
		family: s.family, start: start, changes: len(changes), noLocal: s.noLocal.Len(), contested: s.contested.Len(), triggers: triggers, err: err,
	})
	return err
}

// changes lists what the load balancer shall do about the changed frontends.
func (s *syncer) changes() []lb.Change {
	changes := make([]lb.Change, 0, s.changed.Len())
	for frontend := range s.changed {
		claimants := s.claims[frontend]
		if len(claimants) == 0 {
			changes = append(changes, lb.Change{Frontend: frontend, Withdraw: true})
			continue
		}
		changes = append(changes, s.changeOf(frontend, claimants[0]))
	}
	return changes
}

// changeOf says what the frontend of a port that has it shall be: spread over the endpoints that kube-proxy would choose, refused if there
// are none anywhere, and left to the packet path, which drops it, if there are only none here.
//
// Whoever connects through this node's sockets is inside the cluster: an address for the world outside leads to the endpoints that its
// cluster policy names, whatever the external one is.
func (s *syncer) changeOf(frontend lb.Frontend, c claimant) lb.Change {
	name, port := c.name, s.ports[c.name]
	eligible, local, _, anywhere := proxy.CategorizeEndpoints(s.endpointsOf[name], port, s.nodeName, s.topology)
	if !c.other {
		if port.InternalPolicyLocal() {
			eligible = local
		}
		if len(eligible) == 0 && anywhere {
			s.noLocal.Insert(name)
			return lb.Change{Frontend: frontend, Withdraw: true}
		}
		s.noLocal.Delete(name)
	}

	backends := make([]netip.AddrPort, 0, len(eligible))
	for _, endpoint := range eligible {
		address, err := netip.ParseAddr(endpoint.IP())
		if err != nil || !lb.IsHost(address) {
			klog.ErrorS(err, "Endpoint ignored, which is no host's address", "servicePort", name, "endpoint", endpoint)
			continue
		}
		backends = append(backends, netip.AddrPortFrom(address, uint16(endpoint.Port())))
	}
	return lb.Change{Frontend: frontend, Backends: backends, Affinity: affinityOf(name, port)}
}

// affinityOf gives the frontends of a port one affinity, which is the same after the agent was started again.
func affinityOf(name proxy.ServicePortName, port proxy.ServicePort) lb.Affinity {
	if port.SessionAffinityType() != v1.ServiceAffinityClientIP {
		return lb.Affinity{}
	}
	// Nobody can name a Service so that it has the ID of another.
	sum := sha256.Sum256([]byte(name.String() + "/" + string(name.Protocol)))
	return lb.Affinity{
		ID:      binary.BigEndian.Uint64(sum[:]) >> 16,
		Timeout: time.Duration(port.StickyMaxAgeSeconds()) * time.Second,
	}
}

// settle forgets what was done and keeps what failed for the next sync.
func (s *syncer) settle(err error) {
	s.changed = sets.New[lb.Frontend]()
	for failed := range frontendErrors(err) {
		s.changed.Insert(failed.Frontend)
		if claimants := s.claims[failed.Frontend]; len(claimants) > 0 {
			klog.ErrorS(failed.Err, "Service port not programmed", "servicePort", claimants[0].name, "frontend", failed.Frontend)
			continue
		}
		klog.ErrorS(failed.Err, "Frontend not withdrawn", "frontend", failed.Frontend)
	}
}

// frontendErrors lists what lb.Balancer's Sync joined.
func frontendErrors(err error) func(yield func(*lb.FrontendError) bool) {
	return func(yield func(*lb.FrontendError) bool) {
		joined, ok := err.(interface{ Unwrap() []error })
		if !ok {
			return
		}
		for _, err := range joined.Unwrap() {
			var failed *lb.FrontendError
			if errors.As(err, &failed) && !yield(failed) {
				return
			}
		}
	}
}

// prune has the frontends withdrawn that a former agent left and no Service has any more. It comes with the first sync,
// which looks at every Service.
func (s *syncer) prune() {
	if s.pruned {
		return
	}
	s.pruned = true
	for frontend := range s.balancer.Frontends() {
		if frontend.Address.Addr().Is4() == (s.family == v1.IPv4Protocol) {
			s.changed.Insert(frontend)
		}
	}
}

// frontendsOf lists where a port is served: at its ClusterIP, its external and load balancers' addresses, and its NodePort on this
// node's own address. A load balancer's address with source ranges is left to the packet path: at connect(2) the client's address is
// not known yet.
func (s *syncer) frontendsOf(port proxy.ServicePort) []lb.Frontend {
	addresses := append([]net.IP{port.ClusterIP()}, port.ExternalIPs()...)
	if len(port.LoadBalancerSourceRanges()) == 0 {
		addresses = append(addresses, port.LoadBalancerVIPs()...)
	}
	frontends := make([]lb.Frontend, 0, len(addresses)+1)
	for _, address := range addresses {
		if frontend, ok := frontendAt(address, port.Port(), port.Protocol()); ok {
			frontends = append(frontends, frontend)
		}
	}
	if port.NodePort() != 0 && s.nodeAddress.IsValid() {
		if frontend, ok := frontendAt(s.nodeAddress.AsSlice(), port.NodePort(), port.Protocol()); ok {
			frontends = append(frontends, frontend)
		}
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
	default:
		return lb.Frontend{}, false
	}
	address, ok := netip.AddrFromSlice(ip)
	address = address.Unmap()
	ok = ok && lb.IsHost(address) && !address.IsLoopback() && !address.IsLinkLocalUnicast()
	return lb.Frontend{Address: netip.AddrPortFrom(address, uint16(port)), Protocol: number}, ok
}
