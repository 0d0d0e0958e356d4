// SPDX-License-Identifier: Apache-2.0

package agent_test

import (
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	v1 "k8s.io/api/core/v1"
	discovery "k8s.io/api/discovery/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/client-go/kubernetes/fake"
	"k8s.io/client-go/kubernetes/scheme"
	k8stesting "k8s.io/client-go/testing"

	"github.com/plimsoll-bench/plimsoll/dataplane/agent"
	"github.com/plimsoll-bench/plimsoll/dataplane/lb"
)

// A webAPI serves what a fake client set holds as an API server does, by HTTP/2 over TLS, in protobuf, until it misbehaves.
type webAPI struct {
	*testing.T
	client  *fake.Clientset
	address string
	server  *httptest.Server
	trouble atomic.Pointer[http.HandlerFunc] // answers instead; nil: nothing is wrong
}

func startWebAPI(t *testing.T, client *fake.Clientset) *webAPI {
	t.Helper()
	a := &webAPI{T: t, client: client, address: freeAddress(t)}
	a.listen()
	t.Cleanup(func() { a.close() })
	return a
}

func (a *webAPI) listen() {
	a.Helper()
	listener, err := net.Listen("tcp", a.address)
	if err != nil {
		a.Fatal(err)
	}
	a.server = httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if trouble := a.trouble.Load(); trouble != nil {
			(*trouble)(w, r)
			return
		}
		a.serve(w, r)
	}))
	a.server.Listener.Close()
	a.server.Listener, a.server.EnableHTTP2 = listener, true
	a.server.StartTLS()
}

func (a *webAPI) close() {
	a.server.CloseClientConnections()
	a.server.Close()
}

// kubeconfig is a file by which clients reach the API, whose certificate is httptest's: it names example.com, not the address.
func (a *webAPI) kubeconfig() string {
	a.Helper()
	ca := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: a.server.Certificate().Raw})
	text := fmt.Sprintf("apiVersion: v1\nkind: Config\nclusters: [{name: c, cluster: {server: 'https://%s', tls-server-name: example.com, certificate-authority-data: %s}}]\n"+
		"contexts: [{name: c, context: {cluster: c}}]\ncurrent-context: c\n", a.address, base64.StdEncoding.EncodeToString(ca))
	file := filepath.Join(a.TempDir(), "kubeconfig")
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		a.Fatal(err)
	}
	return file
}

// misbehave has all requests answered by handler from now on, and ends what is under way. A nil handler ends the trouble.
func (a *webAPI) misbehave(handler http.HandlerFunc) {
	if handler == nil {
		a.trouble.Store(nil)
	} else {
		a.trouble.Store(&handler)
	}
	a.server.CloseClientConnections()
}

var kinds = map[string]schema.GroupVersionKind{
	"services":       v1.SchemeGroupVersion.WithKind("Service"),
	"nodes":          v1.SchemeGroupVersion.WithKind("Node"),
	"endpointslices": discovery.SchemeGroupVersion.WithKind("EndpointSlice"),
}

// serve answers lists and watches. It has no history: who watches from an older version lists anew.
func (a *webAPI) serve(w http.ResponseWriter, r *http.Request) {
	resource := path.Base(r.URL.Path)
	kind := kinds[resource]
	list, err := a.client.Tracker().List(kind.GroupVersion().WithResource(resource), kind, "")
	if err != nil {
		a.Error(err)
		return
	}
	if r.URL.Query().Get("watch") == "" {
		write(w, http.StatusOK, kind.GroupVersion(), list)
		return
	}
	accessor, err := meta.ListAccessor(list)
	if err != nil {
		a.Error(err)
		return
	}
	switch version := r.URL.Query().Get("resourceVersion"); {
	case r.URL.Query().Get("sendInitialEvents") != "": // as an API server before 1.34
		refusal := apierrors.NewInvalid(schema.GroupKind{Kind: "ListOptions"}, "", nil).Status()
		write(w, http.StatusUnprocessableEntity, v1.SchemeGroupVersion, &refusal)
	case version != accessor.GetResourceVersion():
		refusal := apierrors.NewResourceExpired("too old").Status()
		write(w, http.StatusGone, v1.SchemeGroupVersion, &refusal)
	default:
		a.watch(w, r, resource, kind, version)
	}
}

func (a *webAPI) watch(w http.ResponseWriter, r *http.Request, resource string, kind schema.GroupVersionKind, version string) {
	events, err := a.client.Tracker().Watch(kind.GroupVersion().WithResource(resource), "", metav1.ListOptions{ResourceVersion: version})
	if err != nil {
		a.Error(err)
		return
	}
	defer events.Stop()
	w.Header().Set("Content-Type", runtime.ContentTypeProtobuf+";stream=watch")
	w.WriteHeader(http.StatusOK)
	w.(http.Flusher).Flush()
	info := protobuf()
	frames := info.StreamSerializer.Framer.NewFrameWriter(w)
	for {
		select {
		case <-r.Context().Done():
			return
		case event := <-events.ResultChan():
			object := metav1.WatchEvent{Type: string(event.Type), Object: runtime.RawExtension{Raw: encode(info.Serializer, kind.GroupVersion(), event.Object)}}
			if _, err := frames.Write(encode(info.StreamSerializer.Serializer, v1.SchemeGroupVersion, &object)); err != nil {
				return
			}
			w.(http.Flusher).Flush()
		}
	}
}

func protobuf() runtime.SerializerInfo {
	info, _ := runtime.SerializerInfoForMediaType(scheme.Codecs.SupportedMediaTypes(), runtime.ContentTypeProtobuf)
	return info
}

func encode(serializer runtime.Serializer, version schema.GroupVersion, object runtime.Object) []byte {
	b, err := runtime.Encode(scheme.Codecs.EncoderForVersion(serializer, version), object)
	if err != nil {
		panic(err)
	}
	return b
}

func write(w http.ResponseWriter, code int, version schema.GroupVersion, object runtime.Object) {
	w.Header().Set("Content-Type", runtime.ContentTypeProtobuf)
	w.WriteHeader(code)
	w.Write(encode(protobuf().Serializer, version, object))
}

// says is a handler that answers everything alike.
func says(code int, contentType, text string) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", contentType)
		w.WriteHeader(code)
		fmt.Fprint(w, text)
	}
}

// Whatever the API server answers, Services are carried as they were known, and what changes meanwhile follows when it passes.
func TestAPIServerMisbehaves(t *testing.T) {
	lines := agent.StartLogs(t)
	half := func(a *webAPI) http.HandlerFunc {
		return func(w http.ResponseWriter, r *http.Request) {
			whole := httptest.NewRecorder()
			r.URL.RawQuery = "" // a list
			a.serve(whole, r)
			w.Header().Set("Content-Type", runtime.ContentTypeProtobuf)
			w.Write(whole.Body.Bytes()[:whole.Body.Len()/2])
		}
	}
	silent := func(a *webAPI) http.HandlerFunc {
		return func(w http.ResponseWriter, r *http.Request) {
			if r.URL.Query().Get("watch") == "" || r.URL.Query().Get("sendInitialEvents") != "" {
				a.serve(w, r)
				return
			}
			w.Header().Set("Content-Type", runtime.ContentTypeProtobuf+";stream=watch")
			w.Write([]byte{0, 0, 1, 0, 'k', '8', 's'}) // of a frame of 256 bytes
			w.(http.Flusher).Flush()
			<-r.Context().Done()
		}
	}
	object := func(text string) http.HandlerFunc { return says(200, "application/json", text) }
	unauthorized := says(401, "application/json", `{"kind":"Status","apiVersion":"v1","status":"Failure","reason":"Unauthorized","code":401}`)
	// Two at a time: one is answered to who asks for endpoint slices, the other to all others.
	pair := func(slices, others http.HandlerFunc) func(*webAPI) http.HandlerFunc {
		return func(*webAPI) http.HandlerFunc {
			return func(w http.ResponseWriter, r *http.Request) {
				if path.Base(r.URL.Path) == "endpointslices" {
					slices(w, r)
				} else {
					others(w, r)
				}
			}
		}
	}
	t.Run("all", func(t *testing.T) { // which ends when the parallel ones have
		for name, trouble := range map[string]struct {
			handler func(*webAPI) http.HandlerFunc // nil: nobody listens
			unheard bool                           // whether it takes the agent long to notice
		}{
			"refused": {nil, false},
			"500, reset": {pair(says(500, "text/plain", "etcdserver: leader changed"),
				func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) }), false},
			"401, HTML": {pair(unauthorized, says(200, "text/html", "<html>Log in to the network</html>")), false},
			"half of JSON, nothing": {pair(object(`{"kind":"EndpointSliceList","apiVersion":"discovery.k8s.io/v1","metadata":{"resourceVersion":"7"},"items":[`),
				says(200, runtime.ContentTypeProtobuf, "")), false},
			"another list, an empty object": {pair(object(`{"kind":"PodList","apiVersion":"v1","metadata":{"resourceVersion":"7"},"items":[]}`), object(`{}`)), false},
			"success":                       {pair(object(`{"kind":"Status","apiVersion":"v1","status":"Success"}`), object(`{"kind":"Status","apiVersion":"v1","status":"Success"}`)), false},
			"half of protobuf":              {half, false},
			"half an event":                 {silent, true},
		} {
			t.Run(name, func(t *testing.T) {
				t.Parallel()
				testTrouble(t, trouble.handler, trouble.unheard)
			})
		}
	})
	if text := lines.String(); !strings.Contains(text, `"API server is away: Services are carried as they were known, and changes wait"`) ||
		!strings.Contains(text, `"API server answers again: changes that were made meanwhile follow"`) {
		t.Errorf("the log does not say so:\n%s", text)
	}
}

// runByWeb runs the agent against the rig's objects as an API server's, which may misbehave.
func (r *rig) runByWeb() *webAPI {
	r.Helper()
	r.patience = 90 * time.Second // an informer asks again when it thinks fit: after up to a minute, when it has asked often
	api := startWebAPI(r.T, r.client)
	client, err := agent.NewClient(api.kubeconfig())
	if err != nil {
		r.Fatal(err)
	}
	r.run(agent.Config{Client: client, Cgroup: r.pod.Cgroup})
	return api
}

// outageVariable is how long the API server of TestAPIServerMisbehaves is away, if that is to be long.
const outageVariable = "PLIMSOLL_OUTAGE"

func outage(t *testing.T) time.Duration {
	t.Helper()
	text := os.Getenv(outageVariable)
	if text == "" {
		return 0
	}
	d, err := time.ParseDuration(text)
	if err != nil {
		t.Fatalf("%s: %v", outageVariable, err)
	}
	return d
}

// looks is how often clients connect while the API server is away.
const looks = 20

func testTrouble(t *testing.T, trouble func(*webAPI) http.HandlerFunc, unheard bool) {
	at := func(name, address string) (*v1.Service, *discovery.EndpointSlice) {
		s := service(func(s *v1.Service) { s.Name, s.Spec.ClusterIP, s.Spec.ClusterIPs = name, address, []string{address} }, port("http", v1.ProtocolTCP, 80))
		e := slice(name+"-1", "http", v1.ProtocolTCP, endpoint(one, thisNode))
		e.Labels[discovery.LabelServiceName] = name
		return s, e
	}
	going, ofGoing := at("going", "10.96.0.11")
	coming, ofComing := at("coming", "10.96.0.12")
	r := newRig(t, service(nil, port("http", v1.ProtocolTCP, 80)), slice("web-1", "http", v1.ProtocolTCP, endpoint(one, thisNode)), going, ofGoing)
	api := r.runByWeb()
	r.wants("tcp", http80, one+":8080")
	r.wants("tcp", "10.96.0.11:80", one+":8080")
	if away := r.away(); len(away) > 0 {
		t.Errorf("the API server is said to be away: %q", away)
	}

	if trouble == nil {
		api.close()
	} else {
		api.misbehave(trouble(api))
	}
	if !unheard {
		// That a watch was cut off comes first, and why is known when another is begun.
		var away []string
		r.eventually(func() bool {
			away = r.away()
			return slices.ContainsFunc(away, func(reason string) bool { return !strings.Contains(reason, "ended before") })
		}, func() string { return fmt.Sprintf("the reasons are %q", away) })
		if _, text := r.get(r.metric, "/metrics"); strings.Contains(text, "\nplimsoll_lb_api_away_seconds 0\n") {
			t.Error("the metric says that the API server is not away")
		}
	}
	r.updateSlice(slice("web-1", "http", v1.ProtocolTCP, endpoint(two, thisNode)))
	if err := r.client.CoreV1().Services("default").Delete(t.Context(), "going", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	r.create(coming, ofComing)
	pause := outage(t) / looks
	for range looks {
		time.Sleep(pause)
		for _, address := range []string{http80, "10.96.0.11:80"} {
			if got := r.pod.Connect(t, "tcp", address, 5); got.Answers[one+":8080"] != 5 {
				t.Errorf("%s while the API server is away: %+v", address, got)
			}
		}
	}
	for _, page := range []string{"/healthz", "/livez"} {
		if code, text := r.get(r.health, page); code != http.StatusOK {
			t.Errorf("%s while the API server is away: %d %s", page, code, text)
		}
	}

	if trouble == nil {
		api.listen()
	} else {
		api.misbehave(nil)
	}
	r.wants("tcp", http80, two+":8080")
	r.wants("tcp", "10.96.0.12:80", one+":8080")
	r.wantsError("tcp", "10.96.0.11:80", unix.ENETUNREACH)
	r.eventually(func() bool { return len(r.away()) == 0 }, func() string { return "the API server is said to be away still" })
}

// away lists what status says of an API server that is away, and fails the test if metrics say otherwise.
func (r *rig) away() (reasons []string) {
	r.Helper()
	report := r.report()
	_, metrics := r.get(r.metric, "/metrics") // after the report: what it says was counted by then
	for _, a := range report.API {
		if a.AwaySince.IsZero() {
			continue
		}
		reasons = append(reasons, a.LastError)
		if strings.Contains(metrics, "\nplimsoll_lb_api_errors_total{resource=\""+a.Resource+"\"} 0\n") {
			r.Errorf("no error of %s is counted", a.Resource)
		}
	}
	return reasons
}

// report is what status says.
func (r *rig) report() (report agent.Report) {
	r.Helper()
	_, text := r.get(r.metric, "/status")
	if err := json.Unmarshal([]byte(text), &report); err != nil {
		r.Fatalf("%v: %s", err, text)
	}
	return report
}

// A list that is whole and empty is believed: there are no Services any more.
func TestAPIServerListsNone(t *testing.T) {
	lines := agent.StartLogs(t)
	r := newRig(t, service(nil, port("http", v1.ProtocolTCP, 80)), slice("web-1", "http", v1.ProtocolTCP, endpoint(one, thisNode)))
	api := r.runByWeb()
	r.wants("tcp", http80, one+":8080")
	empty := startWebAPI(t, fake.NewClientset(node(thisNode)))
	api.misbehave(empty.serve)
	r.wantsError("tcp", http80, unix.ENETUNREACH)
	if text := lines.String(); !strings.Contains(text, `"The API server has no Services any more: all are withdrawn" ipFamily="IPv4" servicePorts=1`) {
		t.Errorf("the log does not say so:\n%s", text)
	}
	api.misbehave(nil)
	r.wants("tcp", http80, one+":8080")
}

// A snapshot is used whenever it says that it was written: the clock may have been wrong then, or be now.
func TestSnapshotOfAnotherTime(t *testing.T) {
	file := filepath.Join(t.TempDir(), "snapshot")
	r := newRig(t)
	r.client.PrependReactor("list", "*", func(k8stesting.Action) (bool, runtime.Object, error) {
		return true, nil, errors.New("not yet")
	})
	frontend := lb.Frontend{Address: netip.MustParseAddrPort(http80), Protocol: lb.TCP}
	for name, written := range map[string]time.Time{"future": time.Now().AddDate(1, 0, 0), "past": time.Now().AddDate(-1, 0, 0), "none": {}} {
		t.Run(name, func(t *testing.T) {
			snapshot := lb.Snapshot{Time: written, Node: thisNode, Frontends: []lb.Change{{Frontend: frontend, Backends: []netip.AddrPort{netip.MustParseAddrPort(one + ":8080")}}}}
			if err := snapshot.Write(file); err != nil {
				t.Fatal(err)
			}
			end := r.run(agent.Config{Cgroup: r.pod.Cgroup, Snapshot: file})
			r.wants("tcp", http80, one+":8080")
			end()
		})
	}
}
