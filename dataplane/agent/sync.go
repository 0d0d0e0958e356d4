// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"slices"
	"sync"
	"time"

	v1 "k8s.io/api/core/v1"
	discovery "k8s.io/api/discovery/v1"
	"k8s.io/apimachinery/pkg/types"
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
	family     v1.IPFamily
	nodeName   string
	balancer   *lb.Balancer
	network    *network // nil where no packets are looked at
	masquerade bool     // all
	save       *saver   // nil where no snapshot is kept
	sweep      *sweeper // nil where sockets are left alone
	status     *status
	runner     *runner.BoundedFrequencyRunner
	complete   func()
	flows      signal // udp has some
	services   *proxy.ServiceChangeTracker
	endpoints  *proxy.EndpointsChangeTracker

	// Guarded by mu.
	mu          sync.Mutex
	unsynced    int                                  // first lists that have not been seen whole: of Services, of slices, of the node
	seen        int                                  // changes that were seen
	triggers    map[types.NamespacedName][]time.Time // when what the next sync sees to was changed
	topology    map[string]string
	nodeAddress netip.Addr // where NodePorts are served; zero until the node says
	ports       proxy.ServicePortMap
	endpointsOf proxy.EndpointsMap
	ignored     map[types.NamespacedName]sets.Set[string]  // addresses of Services that cannot be served
	claims      map[lb.Frontend][]claimant                 // who wants a frontend, sorted; the first has it
	contested   sets.Set[lb.Frontend]                      // those that several want
	changed     sets.Set[lb.Frontend]                      // those to look at in the next sync, never as they are to clients outside
	outside     sets.Set[lb.Frontend]                      // those that are published for clients outside
	noLocal     map[string]sets.Set[proxy.ServicePortName] // ports with a local policy, internal or external, and no local endpoint
	udp         proxy.ServicePortMap                       // ports over UDP that changed, or whose endpoints did, since conntrack was cleaned
	health      *serviceHealth
	pruned      bool      // whether a former agent's frontends were looked through
	synced      time.Time // the last sync without an error; zero: none yet
	failed      int       // frontends that the last sync could not program
}

var (
	_ proxyconfig.ServiceHandler       = &syncer{}
	_ proxyconfig.EndpointSliceHandler = &syncer{}
	_ proxyconfig.NodeTopologyHandler  = &syncer{}
	_ proxyconfig.NodeHandler          = &syncer{}
)

// Traffic policies, as kube-proxy's metrics name them.
const internal, external = "internal", "external"

// newSyncer makes one that calls complete once, when all that it has seen first is carried, as far as that can be.
func newSyncer(cfg Config, family v1.IPFamily, balancer *lb.Balancer, network *network, status *status, save *saver, sweep *sweeper, complete func()) *syncer {
	s := &syncer{
		family:      family,
		nodeName:    cfg.NodeName,
		balancer:    balancer,
		network:     network,
		masquerade:  cfg.MasqueradeAll,
		save:        save,
		sweep:       sweep,
		status:      status,
		unsynced:    3,
		ports:       make(proxy.ServicePortMap),
		endpointsOf: make(proxy.EndpointsMap),
		triggers:    make(map[types.NamespacedName][]time.Time),
		ignored:     make(map[types.NamespacedName]sets.Set[string]),
		claims:      make(map[lb.Frontend][]claimant),
		contested:   sets.New[lb.Frontend](),
		changed:     sets.New[lb.Frontend](),
		outside:     sets.New[lb.Frontend](),
		health:      newServiceHealth(cfg, family, status),
		complete:    sync.OnceFunc(complete),
		udp:         make(proxy.ServicePortMap),
		flows:       newSignal(),
		noLocal: map[string]sets.Set[proxy.ServicePortName]{
			internal: sets.New[proxy.ServicePortName](), external: sets.New[proxy.ServicePortName](),
		},
	}
	s.services = proxy.NewServiceChangeTracker(family, nil, s.portsChanged)
	s.endpoints = proxy.NewEndpointsChangeTracker(family, cfg.NodeName, nil, s.endpointsChanged)
	s.runner = runner.NewBoundedFrequencyRunner(fmt.Sprintf("sync %s", family), s.sync, cfg.MinSyncPeriod, retryPeriod, max(time.Hour, cfg.MinSyncPeriod))
	return s
}

// loop syncs when there is something to, until stop is closed.
func (s *syncer) loop(stop <-chan struct{}) {
	s.status.started(s.family)
	var cleaner sync.WaitGroup
	if s.network != nil {
		cleaner.Go(func() { s.clean(stop) })
	}
	s.runner.Loop(stop)
	cleaner.Wait()
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.health.close(); err != nil {
		klog.ErrorS(err, "Health checks of Services not ended", "ipFamily", s.family)
	}
}

// absorbed is how many changes are looked at together while the first lists come, so that little is left to do when they have come.
const absorbed = 4096

// request has the next sync run as soon as it may.
func (s *syncer) request() {
	s.mu.Lock()
	ready := s.unsynced == 0
	if s.seen++; !ready && s.seen%absorbed == 0 {
		s.absorb()
	}
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
	s.noteAddresses(old, service)
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

// portsChanged is told by the tracker what a changed Service was and is, inside of sync.
func (s *syncer) portsChanged(previous, current proxy.ServicePortMap) {
	s.health.portsChanged(previous, current)
	for name, port := range previous {
		s.release(name, port)
		for _, ports := range s.noLocal {
			ports.Delete(name)
		}
	}
	for name, port := range current {
		s.claim(name, port)
		s.noteUDP(name, port)
	}
}

// endpointsChanged is told by the tracker what a changed Service's endpoints were and are, inside of sync, when ports are known.
func (s *syncer) endpointsChanged(previous, current proxy.EndpointsMap) {
	for _, endpoints := range []proxy.EndpointsMap{previous, current} {
		for name := range endpoints {
			if port, exists := s.ports[name]; exists {
				s.changed.Insert(s.frontendsOf(port)...)
				s.noteUDP(name, port)
				s.health.endpointsChanged(name)
			}
		}
	}
}

// noteUDP has conntrack's entries and sockets of a port looked at that may lead to endpoints that are gone.
func (s *syncer) noteUDP(name proxy.ServicePortName, port proxy.ServicePort) {
	if port.Protocol() == v1.ProtocolUDP {
		s.udp[name] = port
	}
}

// cleanPeriod is the least time between two looks at all of conntrack's entries, which there may be a million of. kube-proxy's is that of
// its syncs, 1 s.
const cleanPeriod = time.Second

// clean has flows of UDP by packets leave endpoints that are gone, after syncs, until stop is closed.
func (s *syncer) clean(stop <-chan struct{}) {
	pause := time.NewTicker(cleanPeriod)
	defer pause.Stop()
	for {
		select {
		case <-stop:
			return
		case <-s.flows:
		}
		s.mu.Lock()
		ports, endpoints := s.udp, make(proxy.EndpointsMap)
		s.udp = make(proxy.ServicePortMap)
		for name := range ports {
			endpoints[name] = s.endpointsOf[name]
		}
		s.mu.Unlock()
		s.network.cleanUDP(s.family, ports, endpoints)
		select {
		case <-stop:
			return
		case <-pause.C:
		}
	}
}

// cleanLater has flows of UDP leave endpoints that are gone, once the load balancer gives these to nobody.
func (s *syncer) cleanLater() {
	if len(s.udp) == 0 {
		return
	}
	s.sweep.note()
	if s.network == nil {
		s.udp = make(proxy.ServicePortMap)
		return
	}
	s.flows.give()
}

// sync gives the load balancer what changed since it ran last. An error has it run again after retryPeriod.
func (s *syncer) sync() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.unsynced > 0 {
		return nil
	}
	start := time.Now()
	s.absorb()
	s.prune()

	changes := s.changes()
	err := s.balancer.Sync(changes)
	s.settle(err)
	s.complete()
	if len(changes) > 0 {
		s.save.note()
	}
	s.cleanLater()
	if err := s.health.sync(s.endpointsOf); err != nil {
		klog.ErrorS(err, "Health checks of Services not served", "ipFamily", s.family)
	}
	s.status.synced(outcome{
		family: s.family, start: start, changes: len(changes), noLocal: s.noLocal, contested: s.contested.Len(), triggers: s.triggers, err: err,
	})
	clear(s.triggers)
	return err
}

// absorb has the trackers tell what has changed. Ports come first, and bring what is known of their endpoints with them.
func (s *syncer) absorb() {
	before := len(s.ports)
	s.ports.Update(s.services)
	if before > 0 && len(s.ports) == 0 {
		// An API server that lost its data says so, too, with all the right marks. It is believed, as kube-proxy does.
		klog.InfoS("The API server has no Services any more: all are withdrawn", "ipFamily", s.family, "servicePorts", before)
	}
	maps.Copy(s.triggers, s.endpointsOf.Update(s.endpoints).LastChangeTriggerTimes)
}

// report tells what this IP family is like; how full its maps are the load balancer knows.
func (s *syncer) report() FamilyReport {
	s.mu.Lock()
	defer s.mu.Unlock()
	r := FamilyReport{Family: string(s.family), LastSync: s.synced, Failed: s.failed, Contested: s.contested.Len(), Ignored: s.ignoredAddresses()}
	for _, port := range s.ports {
		r.Ports.ClusterIP++
		r.Ports.ExternalIP += len(port.ExternalIPs())
		r.Ports.LoadBalancer += len(port.LoadBalancerVIPs())
		if port.NodePort() != 0 {
			r.Ports.NodePort++
		}
		if port.SessionAffinityType() == v1.ServiceAffinityClientIP {
			r.Ports.Affinity++
		}
	}
	return r
}

// changes lists what the load balancer shall do about the changed frontends.
func (s *syncer) changes() []lb.Change {
	changes := make([]lb.Change, 0, s.changed.Len())
	for frontend := range s.changed {
		claimants := s.claims[frontend]
		// Who has an address for the world outside has it for clients from there, too. A ClusterIP is the same to all. This one comes
		// first: without it those outside would be taken for those inside.
		switch theirs := outside(frontend); {
		case s.network != nil && len(claimants) > 0 && claimants[0].other():
			s.outside.Insert(theirs)
			changes = append(changes, s.changeOf(theirs, claimants[0]))
		case s.outside.Has(theirs):
			s.outside.Delete(theirs)
			changes = append(changes, lb.Change{Frontend: theirs, Withdraw: true})
		}
		if len(claimants) == 0 {
			changes = append(changes, lb.Change{Frontend: frontend, Withdraw: true})
		} else {
			changes = append(changes, s.changeOf(frontend, claimants[0]))
		}
	}
	return changes
}

// outside is a frontend as it is to clients outside the cluster, and inside as it is to others.
func outside(frontend lb.Frontend) lb.Frontend {
	frontend.Scope = lb.Outside
	return frontend
}

func inside(frontend lb.Frontend) lb.Frontend {
	if frontend.Scope == lb.Outside {
		frontend.Scope = lb.Inside
	}
	return frontend
}

// changeOf says what the frontend of a port that has it shall be: spread over the endpoints that kube-proxy would choose, refused if there
// are none anywhere, and dropped if there are only none here.
//
// Who is inside the cluster reaches the endpoints that the cluster policy names at an address for the world outside, too, whatever the
// external policy is.
func (s *syncer) changeOf(frontend lb.Frontend, c claimant) lb.Change {
	change := lb.Change{Frontend: frontend}
	if frontend.Scope == lb.Rest {
		return change
	}
	name, port := c.name, s.ports[c.name]
	eligible, local, _, anywhere := proxy.CategorizeEndpoints(s.endpointsOf[name], port, s.nodeName, s.topology)
	switch {
	case !c.other():
		if port.InternalPolicyLocal() {
			eligible = local
		}
		change.Drop = s.noteLocal(internal, name, len(eligible) == 0 && anywhere)
		change.Masquerade = s.masquerade
	case frontend.Scope == lb.Outside && port.ExternalPolicyLocal():
		eligible = local
		change.Drop = s.noteLocal(external, name, len(eligible) == 0 && anywhere)
	default:
		change.Masquerade = !port.ExternalPolicyLocal() || s.masquerade
	}
	if slices.ContainsFunc(port.LoadBalancerVIPs(), func(vip net.IP) bool { return isAt(frontend, vip) }) {
		change.Ranges = s.rangesOf(name, port)
	}
	change.Affinity = affinityOf(name, port)

	change.Backends = make([]netip.AddrPort, 0, len(eligible))
	for _, endpoint := range eligible {
		address, err := netip.ParseAddr(endpoint.IP())
		if err != nil || !lb.IsHost(address) {
			klog.ErrorS(err, "Endpoint ignored, which is no host's address", "servicePort", name, "endpoint", endpoint)
			continue
		}
		change.Backends = append(change.Backends, netip.AddrPortFrom(address, uint16(endpoint.Port())))
	}
	if frontend.Protocol == lb.UDP {
		change.Lingering = s.lingering(name, change.Backends)
	}
	return change
}

// lingering are the endpoints that serve, and are not among those that new flows go to. kube-proxy leaves flows to them, too.
func (s *syncer) lingering(name proxy.ServicePortName, backends []netip.AddrPort) []netip.AddrPort {
	var all []netip.AddrPort
	for _, endpoint := range s.endpointsOf[name] {
		address, err := netip.ParseAddr(endpoint.IP())
		if err != nil || !lb.IsHost(address) || !endpoint.IsServing() {
			continue
		}
		if backend := netip.AddrPortFrom(address, uint16(endpoint.Port())); !slices.Contains(backends, backend) {
			all = append(all, backend)
		}
	}
	return all
}

// noteLocal counts a port that lacks local endpoints by a policy, or no longer does, and returns which.
func (s *syncer) noteLocal(policy string, name proxy.ServicePortName, lacks bool) bool {
	if lacks {
		s.noLocal[policy].Insert(name)
	} else {
		s.noLocal[policy].Delete(name)
	}
	return lacks
}

// isAt tells whether a frontend is at an address.
func isAt(frontend lb.Frontend, ip net.IP) bool {
	address, ok := netip.AddrFromSlice(ip)
	return ok && address.Unmap() == frontend.Address.Addr()
}

// rangesOf are where the clients of a load balancer's address are admitted from. The tracker has sorted them by IP version, and left
// none if one is for all.
func (s *syncer) rangesOf(name proxy.ServicePortName, port proxy.ServicePort) []netip.Prefix {
	var ranges []netip.Prefix
	for _, n := range port.LoadBalancerSourceRanges() {
		p, err := netip.ParsePrefix(n.String())
		if err != nil {
			klog.ErrorS(err, "Source range ignored", "servicePort", name)
			continue
		}
		ranges = append(ranges, p)
	}
	return ranges
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
	s.changed, s.failed = sets.New[lb.Frontend](), 0
	if err == nil {
		s.synced = time.Now()
	}
	for failed := range frontendErrors(err) {
		s.failed++
		s.changed.Insert(inside(failed.Frontend))
		if claimants := s.claims[inside(failed.Frontend)]; len(claimants) > 0 {
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
			s.changed.Insert(inside(frontend))
			if frontend.Scope == lb.Outside {
				s.outside.Insert(frontend)
			}
		}
	}
}
