// SPDX-License-Identifier: Apache-2.0

package guest

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"path"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	eventsv1 "k8s.io/api/events/v1"
	networkingv1 "k8s.io/api/networking/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/intstr"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/kubernetes/scheme"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
	clientcmdapi "k8s.io/client-go/tools/clientcmd/api"

	"github.com/plimsoll-bench/plimsoll/clusters/lab"
)

// An api is lists and watches of what a proxy reads, in memory: a guest measures dataplanes and has no control plane. It keeps what it is given,
// checks nothing, and does of an API server's own work only what a fleet waits for: Services get IPAddresses. It speaks protobuf.
type api struct {
	server *http.Server
	done   chan struct{}

	mu       sync.Mutex
	version  uint64
	kinds    map[string]*store // by resource
	watchers map[*watcher]struct{}
}

var _ lab.API = (*api)(nil)

// A store holds the objects of a resource.
type store struct {
	resource string
	kind     schema.GroupVersionKind
	list     func() runtime.Object
	objects  map[string]runtime.Object // by namespace/name
	deleted  uint64                    // the version at which one was deleted last
}

// resources are those that a node's proxy and a fleet ask for.
var resources = []store{
	{resource: "namespaces", kind: corev1.SchemeGroupVersion.WithKind("Namespace"), list: func() runtime.Object { return new(corev1.NamespaceList) }},
	{resource: "nodes", kind: corev1.SchemeGroupVersion.WithKind("Node"), list: func() runtime.Object { return new(corev1.NodeList) }},
	{resource: servicesResource, kind: corev1.SchemeGroupVersion.WithKind("Service"), list: func() runtime.Object { return new(corev1.ServiceList) }},
	{resource: slicesResource, kind: discoveryv1.SchemeGroupVersion.WithKind("EndpointSlice"), list: func() runtime.Object { return new(discoveryv1.EndpointSliceList) }},
	{resource: addressesResource, kind: networkingv1.SchemeGroupVersion.WithKind("IPAddress"), list: func() runtime.Object { return new(networkingv1.IPAddressList) }},
	{resource: "servicecidrs", kind: networkingv1.SchemeGroupVersion.WithKind("ServiceCIDR"), list: func() runtime.Object { return new(networkingv1.ServiceCIDRList) }},
	{resource: "events", kind: eventsv1.SchemeGroupVersion.WithKind("Event"), list: func() runtime.Object { return new(eventsv1.EventList) }},
}

const (
	servicesResource  = "services"
	slicesResource    = "endpointslices"
	addressesResource = "ipaddresses"
)

// apiAddress is where the harness reaches the API, which it serves to nodes by Forward.
const apiAddress = "127.0.0.1:6443"

// startAPI serves an API to the harness.
func startAPI() (*api, error) {
	a, err := newAPI()
	if err != nil {
		return nil, err
	}
	l, err := net.Listen("tcp", apiAddress)
	if err != nil {
		return nil, err
	}
	go a.Forward(l)
	return a, nil
}

// newAPI is one that holds the objects of a cluster without Services of a user's.
func newAPI() (*api, error) {
	a := &api{done: make(chan struct{}), kinds: make(map[string]*store), watchers: make(map[*watcher]struct{})}
	a.server = &http.Server{Handler: a, ReadHeaderTimeout: time.Minute}
	for _, s := range resources {
		s.objects = make(map[string]runtime.Object)
		a.kinds[s.resource] = &s
	}
	for _, o := range ownObjects() {
		if err := a.create(o); err != nil {
			return nil, err
		}
	}
	return a, nil
}

// ownObjects are those that an API server makes by itself.
func ownObjects() []runtime.Object {
	const name = "kubernetes"
	port, target, protocol, ready := "https", int32(6443), corev1.ProtocolTCP, true
	meta := metav1.ObjectMeta{Namespace: metav1.NamespaceDefault, Name: name}
	ofService := meta
	ofService.Labels = map[string]string{discoveryv1.LabelServiceName: name}
	return []runtime.Object{
		&corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: metav1.NamespaceDefault}},
		&networkingv1.ServiceCIDR{
			ObjectMeta: metav1.ObjectMeta{Name: name},
			Spec:       networkingv1.ServiceCIDRSpec{CIDRs: []string{lab.Services().String()}},
			Status:     networkingv1.ServiceCIDRStatus{Conditions: []metav1.Condition{{Type: networkingv1.ServiceCIDRConditionReady, Status: metav1.ConditionTrue}}},
		},
		&discoveryv1.EndpointSlice{
			ObjectMeta: ofService, AddressType: discoveryv1.AddressTypeIPv4,
			Ports:     []discoveryv1.EndpointPort{{Name: &port, Port: &target, Protocol: &protocol}},
			Endpoints: []discoveryv1.Endpoint{{Addresses: []string{lab.Node().String()}, Conditions: discoveryv1.EndpointConditions{Ready: &ready}}},
		},
		&corev1.Service{
			ObjectMeta: meta,
			Spec: corev1.ServiceSpec{
				ClusterIP: lab.Services().Masked().Addr().Next().String(),
				Ports:     []corev1.ServicePort{{Name: port, Port: 443, TargetPort: intstr.FromInt32(target)}},
			},
		},
	}
}

// Forward serves on a listener until it is closed.
func (a *api) Forward(l net.Listener) { a.server.Serve(l) }

func (a *api) RESTConfig() *rest.Config {
	return &rest.Config{
		Host:          "http://" + apiAddress,
		ContentConfig: rest.ContentConfig{ContentType: runtime.ContentTypeProtobuf, AcceptContentTypes: runtime.ContentTypeProtobuf},
		QPS:           -1,
	}
}

// Etcd is nil: there is no storage but memory.
func (a *api) Etcd() (*clientv3.Client, error) { return nil, nil }

func (a *api) Kubeconfig(file, address string) error {
	config := clientcmdapi.NewConfig()
	config.Clusters["guest"] = &clientcmdapi.Cluster{Server: "http://" + address}
	config.Contexts["guest"] = &clientcmdapi.Context{Cluster: "guest"}
	config.CurrentContext = "guest"
	return clientcmd.WriteToFile(*config, file)
}

func (a *api) Done() <-chan struct{} { return a.done }

// Err is nil: the API does not end before its guest does.
func (a *api) Err() error { return nil }

func (a *api) Close(context.Context) error { return a.server.Close() }

// A request is what a path and a query ask for.
type request struct {
	*store
	namespace, name string
}

// route reads /api/v1/… and /apis/GROUP/v1/… .
func (a *api) route(url string) (request, error) {
	parts := strings.Split(strings.Trim(path.Clean(url), "/"), "/")
	switch {
	case len(parts) > 2 && parts[0] == "api":
		parts = parts[2:]
	case len(parts) > 3 && parts[0] == "apis":
		parts = parts[3:]
	default:
		return request{}, apierrors.NewNotFound(schema.GroupResource{}, url)
	}
	var r request
	if parts[0] == "namespaces" && len(parts) > 2 {
		r.namespace, parts = parts[1], parts[2:]
	}
	if len(parts) > 1 {
		r.name = parts[1]
	}
	if r.store = a.kinds[parts[0]]; r.store == nil {
		return r, apierrors.NewNotFound(schema.GroupResource{Resource: parts[0]}, r.name)
	}
	return r, nil
}

func (a *api) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	q, err := a.route(r.URL.Path)
	if err != nil {
		refuse(w, err)
		return
	}
	switch {
	case r.Method == http.MethodGet && q.name != "":
		a.mu.Lock()
		object := q.objects[q.namespace+"/"+q.name]
		a.mu.Unlock()
		answer(w, q, object, nil)
	case r.Method == http.MethodGet && r.URL.Query().Get("watch") != "":
		a.serveWatch(w, r, q)
	case r.Method == http.MethodGet:
		list, err := a.listOf(q, r)
		answer(w, q, list, err)
	case r.Method == http.MethodPost, r.Method == http.MethodPut:
		object, err := decode(r, q.namespace)
		if err == nil && r.Method == http.MethodPost {
			err = a.create(object)
		} else if err == nil {
			err = a.update(object)
		}
		answer(w, q, object, err)
	case r.Method == http.MethodDelete:
		object, err := a.remove(q)
		answer(w, q, object, err)
	default:
		refuse(w, apierrors.NewMethodNotSupported(schema.GroupResource{Resource: q.resource}, r.Method))
	}
}

// answer writes an object, or why there is none.
func answer(w http.ResponseWriter, q request, object runtime.Object, err error) {
	if err == nil && object == nil {
		err = apierrors.NewNotFound(schema.GroupResource{Group: q.kind.Group, Resource: q.resource}, q.name)
	}
	if err != nil {
		refuse(w, err)
		return
	}
	w.Header().Set("Content-Type", runtime.ContentTypeProtobuf)
	w.Write(encode(protobuf.Serializer, q.kind.GroupVersion(), object))
}

func refuse(w http.ResponseWriter, err error) {
	status := apierrors.NewInternalError(err).Status()
	if s, ok := err.(apierrors.APIStatus); ok {
		status = s.Status()
	}
	w.Header().Set("Content-Type", runtime.ContentTypeProtobuf)
	w.WriteHeader(int(status.Code))
	w.Write(encode(protobuf.Serializer, corev1.SchemeGroupVersion, &status))
}

var protobuf = func() runtime.SerializerInfo {
	info, _ := runtime.SerializerInfoForMediaType(scheme.Codecs.SupportedMediaTypes(), runtime.ContentTypeProtobuf)
	return info
}()

// encode is for objects of the scheme, which cannot fail.
func encode(serializer runtime.Serializer, version schema.GroupVersion, object runtime.Object) []byte {
	b, err := runtime.Encode(scheme.Codecs.EncoderForVersion(serializer, version), object)
	if err != nil {
		panic(err)
	}
	return b
}

// decode reads an object, which is in the namespace of its path.
func decode(r *http.Request, namespace string) (runtime.Object, error) {
	body, err := io.ReadAll(r.Body)
	if err != nil {
		return nil, err
	}
	object, _, err := scheme.Codecs.UniversalDeserializer().Decode(body, nil, nil)
	if err != nil {
		return nil, apierrors.NewBadRequest(err.Error())
	}
	o, err := meta.Accessor(object)
	if err != nil {
		return nil, apierrors.NewBadRequest(err.Error())
	}
	o.SetNamespace(namespace)
	return object, nil
}

// A selection is which objects of a resource somebody wants.
type selection struct {
	namespace string
	labels    labels.Selector
	fields    fields.Selector
}

func selectionOf(q request, r *http.Request) (s selection, err error) {
	s.namespace = q.namespace
	if s.labels, err = labels.Parse(r.URL.Query().Get("labelSelector")); err != nil {
		return s, apierrors.NewBadRequest(err.Error())
	}
	if s.fields, err = fields.ParseSelector(r.URL.Query().Get("fieldSelector")); err != nil {
		return s, apierrors.NewBadRequest(err.Error())
	}
	return s, nil
}

func (s selection) wants(object runtime.Object) bool {
	o, err := meta.Accessor(object)
	if err != nil || s.namespace != "" && o.GetNamespace() != s.namespace || !s.labels.Matches(labels.Set(o.GetLabels())) {
		return false
	}
	set := fields.Set{"metadata.name": o.GetName(), "metadata.namespace": o.GetNamespace()}
	if service, ok := object.(*corev1.Service); ok {
		set["spec.clusterIP"] = service.Spec.ClusterIP
	}
	return s.fields.Matches(set)
}

// selected are the objects that are wanted, in the order of their names; with a.mu.
func (q request) selected(s selection) []runtime.Object {
	var names []string
	for name, object := range q.objects {
		if s.wants(object) {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	all := make([]runtime.Object, len(names))
	for i, name := range names {
		all[i] = q.objects[name]
	}
	return all
}

func (a *api) listOf(q request, r *http.Request) (runtime.Object, error) {
	s, err := selectionOf(q, r)
	if err != nil {
		return nil, err
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	list := q.list()
	if err := meta.SetList(list, q.selected(s)); err != nil {
		return nil, err
	}
	about, err := meta.ListAccessor(list)
	if err != nil {
		return nil, err
	}
	about.SetResourceVersion(strconv.FormatUint(a.version, 10))
	return list, nil
}

func keyOf(object runtime.Object) string {
	o, err := meta.Accessor(object)
	if err != nil {
		panic(err) // all that is kept has metadata
	}
	return o.GetNamespace() + "/" + o.GetName()
}

// storeOf is where objects of a type are.
func (a *api) storeOf(object runtime.Object) (*store, error) {
	found, _, err := scheme.Scheme.ObjectKinds(object)
	if err != nil {
		return nil, err
	}
	for _, s := range a.kinds {
		if slices.Contains(found, s.kind) {
			return s, nil
		}
	}
	return nil, apierrors.NewBadRequest(fmt.Sprintf("no resource of %v", found))
}

func (a *api) create(object runtime.Object) error {
	s, err := a.storeOf(object)
	if err != nil {
		return err
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	key := keyOf(object)
	if _, has := s.objects[key]; has {
		return apierrors.NewAlreadyExists(schema.GroupResource{Group: s.kind.Group, Resource: s.resource}, key)
	}
	if service, ok := object.(*corev1.Service); ok {
		complete(service)
		if service.Spec.ClusterIP != corev1.ClusterIPNone {
			a.keep(a.kinds[addressesResource], watch.Added, addressOf(service))
		}
	}
	a.keep(s, watch.Added, object)
	return nil
}

// complete fills in what an API server would.
func complete(service *corev1.Service) {
	spec := &service.Spec
	if spec.Type == "" {
		spec.Type = corev1.ServiceTypeClusterIP
	}
	if spec.SessionAffinity == "" {
		spec.SessionAffinity = corev1.ServiceAffinityNone
	}
	if len(spec.IPFamilies) == 0 {
		policy, cluster, single := corev1.IPFamilyPolicySingleStack, corev1.ServiceInternalTrafficPolicyCluster, corev1.IPv4Protocol
		spec.ClusterIPs, spec.IPFamilies, spec.IPFamilyPolicy, spec.InternalTrafficPolicy = []string{spec.ClusterIP}, []corev1.IPFamily{single}, &policy, &cluster
	}
	for i := range spec.Ports {
		if spec.Ports[i].Protocol == "" {
			spec.Ports[i].Protocol = corev1.ProtocolTCP
		}
	}
}

func addressOf(service *corev1.Service) *networkingv1.IPAddress {
	return &networkingv1.IPAddress{
		ObjectMeta: metav1.ObjectMeta{Name: service.Spec.ClusterIP},
		Spec:       networkingv1.IPAddressSpec{ParentRef: &networkingv1.ParentReference{Resource: servicesResource, Namespace: service.Namespace, Name: service.Name}},
	}
}

func (a *api) update(object runtime.Object) error {
	s, err := a.storeOf(object)
	if err != nil {
		return err
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if _, has := s.objects[keyOf(object)]; !has {
		return apierrors.NewNotFound(schema.GroupResource{Group: s.kind.Group, Resource: s.resource}, keyOf(object))
	}
	a.keep(s, watch.Modified, object)
	return nil
}

// keep stores an object as the newest version and tells those who watch; with a.mu. It is not changed afterwards.
func (a *api) keep(s *store, event watch.EventType, object runtime.Object) {
	o, err := meta.Accessor(object)
	if err != nil {
		panic(err)
	}
	a.version++
	o.SetResourceVersion(strconv.FormatUint(a.version, 10))
	if o.GetUID() == "" {
		o.SetUID(types.UID(fmt.Sprintf("00000000-0000-0000-0000-%012d", a.version)))
	}
	s.objects[keyOf(object)] = object
	a.tell(s, event, object)
}

func (a *api) remove(q request) (runtime.Object, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	key := q.namespace + "/" + q.name
	object, has := q.objects[key]
	if !has {
		return nil, nil
	}
	a.forget(q.store, key)
	if service, ok := object.(*corev1.Service); ok {
		a.forget(a.kinds[addressesResource], "/"+service.Spec.ClusterIP)
	}
	return object, nil
}

// forget deletes an object and tells those who watch; with a.mu.
func (a *api) forget(s *store, key string) {
	object, has := s.objects[key]
	if !has {
		return
	}
	delete(s.objects, key)
	a.version++
	s.deleted = a.version
	a.tell(s, watch.Deleted, object)
}

// A watcher is one who watches a resource. What it was not told yet waits.
type watcher struct {
	of     *store
	wants  selection
	events []watch.Event
	more   chan struct{} // has room for one
}

// tell gives an event to all who want it; with a.mu.
func (a *api) tell(s *store, kind watch.EventType, object runtime.Object) {
	for w := range a.watchers {
		if w.of == s && w.wants.wants(object) {
			w.events = append(w.events, watch.Event{Type: kind, Object: object})
			select {
			case w.more <- struct{}{}:
			default:
			}
		}
	}
}

// watch begins with all there is if a list is asked for as a watch (KEP-3157), and else where a list of this version ended.
func (a *api) watch(q request, r *http.Request) (*watcher, error) {
	wants, err := selectionOf(q, r)
	if err != nil {
		return nil, err
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	w := &watcher{of: q.store, wants: wants, more: make(chan struct{}, 1)}
	since, _ := strconv.ParseUint(r.URL.Query().Get("resourceVersion"), 10, 64)
	whole := r.URL.Query().Get("sendInitialEvents") == "true"
	if !whole && q.deleted > since {
		return nil, apierrors.NewResourceExpired("objects were deleted since") // there is no history: list anew
	}
	for _, object := range q.selected(wants) {
		o, err := meta.Accessor(object)
		if err != nil {
			return nil, err
		}
		version, _ := strconv.ParseUint(o.GetResourceVersion(), 10, 64)
		if whole || version > since {
			// A change after a list looks as one that is new, which reflectors take the same way.
			w.events = append(w.events, watch.Event{Type: watch.Added, Object: object})
		}
	}
	if whole {
		w.events = append(w.events, watch.Event{Type: watch.Bookmark, Object: a.bookmark(q)})
	}
	a.watchers[w] = struct{}{}
	return w, nil
}

// bookmark ends the first events of a watch that is a list, too.
func (a *api) bookmark(q request) runtime.Object {
	object, err := scheme.Scheme.New(q.kind)
	if err != nil {
		panic(err)
	}
	o, err := meta.Accessor(object)
	if err != nil {
		panic(err)
	}
	o.SetResourceVersion(strconv.FormatUint(a.version, 10))
	o.SetAnnotations(map[string]string{metav1.InitialEventsAnnotationKey: "true"})
	return object
}

func (a *api) serveWatch(w http.ResponseWriter, r *http.Request, q request) {
	watching, err := a.watch(q, r)
	if err != nil {
		refuse(w, err)
		return
	}
	defer func() {
		a.mu.Lock()
		defer a.mu.Unlock()
		delete(a.watchers, watching)
	}()
	w.Header().Set("Content-Type", runtime.ContentTypeProtobuf+";stream=watch")
	w.WriteHeader(http.StatusOK)
	flush := w.(http.Flusher).Flush
	flush()
	frames := protobuf.StreamSerializer.Framer.NewFrameWriter(w)
	for {
		a.mu.Lock()
		events := watching.events
		watching.events = nil
		a.mu.Unlock()
		for _, event := range events {
			raw := runtime.RawExtension{Raw: encode(protobuf.Serializer, q.kind.GroupVersion(), event.Object)}
			if _, err := frames.Write(encode(protobuf.StreamSerializer.Serializer, corev1.SchemeGroupVersion, &metav1.WatchEvent{Type: string(event.Type), Object: raw})); err != nil {
				return
			}
		}
		flush()
		select {
		case <-r.Context().Done():
			return
		case <-watching.more:
		}
	}
}
